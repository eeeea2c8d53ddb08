"""From uint8 images to Inception features: FID's preprocessing and network in full float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception import FEATURE_LAYERS, Conv, Inception
from improved_diffusion.metrics.resize import resize_bilinear_tf1
from improved_diffusion.metrics.weights import Layer, load_layers, weights_hash

INPUT_SIZE = 299  # pixels
PREPROCESSING = "resize_bilinear_tf1 299, (x - 128) / 128"


@dataclass(frozen=True)
class FeatureSettings:
    """All that decides a feature, beside the image."""

    features: int
    preprocessing: str
    weights_hash: str


class FeatureExtractor:
    """The Inception network, and the preprocessing that it was given when FID was defined.

    Args:
        features: sizes to extract in one pass, each one of 64, 192, 768 and 2048. The network runs only as deep as the
            largest needs: 64 costs a ninth of 2048.
        device: where the network runs.
        weights: a file of weights; without it the cache, the download or the installed package (see `find_weights`).

    Raises:
        UserError: an unknown feature size, or weights that are missing or fail their hash.

    Attributes:
        batch_size: images per call that run fast on the device.
    """

    def __init__(
        self,
        features: Iterable[int] = (2048,),
        device: torch.device | str = "cpu",
        weights: Path | str | None = None,
    ):
        self.features = tuple(sorted(set(features)))
        unknown = [size for size in self.features if size not in FEATURE_LAYERS]
        if unknown or not self.features:
            known = ", ".join(map(str, FEATURE_LAYERS))
            raise UserError(f"no Inception features of size {unknown[0] if unknown else None}: use one of {known}")
        layers = load_layers(weights)
        self.device = torch.device(device)
        # On a CPU, larger activations than those of a few images cost more in page faults than they save.
        self.batch_size = 16 if self.device.type == "cpu" else 128
        self.weights_hash = weights_hash(layers)
        self.network = build_network(self.features, layers).to(self.device, memory_format=torch.channels_last)

    def settings(self, size: int) -> FeatureSettings:
        """What the features of `size` were made with."""
        return FeatureSettings(features=size, preprocessing=PREPROCESSING, weights_hash=self.weights_hash)

    @torch.inference_mode()
    def __call__(self, images: Tensor | np.ndarray) -> dict[int, Tensor]:
        """uint8 images (N, H, W, 3) of any size to {feature size: float32 (N, feature size)} on `device`.

        Raises:
            ValueError: images of another dtype or layout.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        with full_float32(self.device):
            return self.network(preprocess(images.to(self.device)))


def preprocess(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to the float32 (N, 3, 299, 299) that the network was given: resized, then (x - 128) / 128."""
    resized = resize_bilinear_tf1(images.permute(0, 3, 1, 2).float(), INPUT_SIZE)
    return resized.sub_(128).div_(128).contiguous(memory_format=torch.channels_last)


def build_network(features: Iterable[int], layers: dict[str, Layer]) -> Inception:
    """The network with `layers` folded into it, in evaluation mode."""
    with torch.device("meta"):  # the weights are assigned below: allocating and initializing them first is for nothing
        network = Inception(features)
    state = {}
    for name, module in network.named_modules():
        if isinstance(module, Conv):
            state[f"{name}.weight"], state[f"{name}.bias"] = layers[name].folded()
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Neither TF32 nor autocast: both move features by more than a metric may, and a training loop may have them on."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
