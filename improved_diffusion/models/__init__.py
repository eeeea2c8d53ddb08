"""Networks by kind. A new one is a subclass of `Backbone` in a file of its own, and a line in `BACKBONES`."""

from improved_diffusion.models.backbone import Backbone
from improved_diffusion.models.transformer import Transformer
from improved_diffusion.models.unet import UNet

BACKBONES: dict[str, type[Backbone]] = {"unet": UNet, "transformer": Transformer}
