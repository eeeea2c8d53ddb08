"""From uint8 images to Inception features."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.data.compositing import on_white
from improved_diffusion.data.image_set import CHANNELS
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception.network import CLASSIFIER, LOGITS, Conv, Inception, feature_layers
from improved_diffusion.metrics.inception.preprocessing import INPUT_SIZE, PREPROCESSINGS, SMALLEST_SIDE, preprocess
from improved_diffusion.metrics.inception.weights import Layer, load_classifier, load_layers


@dataclass(frozen=True)
class FeatureSettings:
    """All that decides a feature, beside the image."""

    features: int
    preprocessing: str
    precision: str
    weights_hash: str

    def difference(self, other: FeatureSettings) -> str:
        """What is not the same, in words; empty where all is."""
        left, right = dataclasses.asdict(self), dataclasses.asdict(other)
        return "; ".join(f"{key}: {left[key]!r} and {right[key]!r}" for key in left if left[key] != right[key])


class FeatureExtractor:
    """The Inception network and its preprocessing.

    Args:
        features: sizes to extract in one pass; see `Inception`. The network runs only as deep as the deepest needs.
        device: where the network runs.
        weights: a file of weights; without it the cache, the download or the installed package (see `find_weights`).
        preprocessing: `tf1`, `clean` or `none`; see `preprocess`.
        precision: `float32`, or `bf16`, which is faster and another measurement.

    Raises:
        UserError: an unknown feature size, preprocessing or precision, or weights that are missing, fail their hash, or
            have no classifier where the logits are asked for.

    Attributes:
        batch_size: images per call that run fast on the device.
    """

    def __init__(
        self,
        features: Iterable[int] = (2048,),
        device: torch.device | str = "cpu",
        weights: Path | str | None = None,
        preprocessing: str = "tf1",
        precision: str = "float32",
    ):
        self.features = tuple(sorted(set(features)))
        known = feature_layers()
        unknown = [size for size in self.features if size not in known]
        if unknown or not self.features:
            raise UserError(
                f"no Inception features of size {unknown[0] if unknown else None}: use one of "
                f"{', '.join(map(str, known))}"
            )
        if preprocessing not in PREPROCESSINGS:
            raise UserError(f"no preprocessing {preprocessing!r}: use one of {', '.join(PREPROCESSINGS)}")
        if precision not in ("float32", "bf16"):
            raise UserError(f"no precision {precision!r}: use float32 or bf16")
        layers = load_layers(weights)
        classifier = load_classifier(weights) if LOGITS in self.features else None
        self.device = torch.device(device)
        self.preprocessing = preprocessing
        self.precision = precision
        # On a CPU, larger activations than those of a few images cost more in page faults than they save.
        self.batch_size = 8 if self.device.type == "cpu" else 128
        self.weights_hash = layers.hash
        network = fold_layers(self.features, layers, classifier)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._compiled: Callable[[Tensor], dict[int, Tensor]] | None = None

    def settings(self, size: int) -> FeatureSettings:
        """What the features of `size` were made with."""
        return FeatureSettings(size, self.preprocessing, self.precision, self.weights_hash)

    def compile(self) -> None:
        """Compile the network: half a minute or more once, for about 1.5 times the speed on a CPU. It then runs in
        batches of `batch_size`, shorter ones being filled up. Where there is no compiler it warns and changes nothing.
        """
        # Without the cache of graphs: it takes no notice of the instruction set, by which frozen weights are laid out.
        options = {"freezing": True, "fx_graph_cache": False}
        compiled = torch.compile(self.network, dynamic=False, options=options)
        try:
            with torch.inference_mode(), self._arithmetic():
                compiled(_blank(self.batch_size).to(self.device))
        except Exception as error:  # torch wraps whatever a missing or broken compiler does
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the network cannot be compiled here and runs uncompiled: {reason}", stacklevel=2)
        else:
            self._compiled = compiled

    @torch.inference_mode()
    def __call__(self, images: Tensor | np.ndarray) -> dict[int, Tensor]:
        """uint8 images (N, H, W, C) to {feature size: float32 (N, feature size)} on `device`.

        The network sees RGB: grey is repeated, and RGBA is composited on white.

        Raises:
            ValueError: images of another dtype or layout.
            UserError: images too small to mean anything, or of a size that does not go with `none`.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in CHANNELS:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 (N, H, W, 3), or with 1 or 4 channels, got {found}")
        height, width = images.shape[1:3]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(f"images of {width}x{height} pixels: below {SMALLEST_SIDE} a side nothing can be measured")
        if self.preprocessing == "none" and (height, width) != (INPUT_SIZE, INPUT_SIZE):
            raise UserError(
                f"images of {width}x{height} pixels: preprocessing none takes {INPUT_SIZE}x{INPUT_SIZE}; use tf1 or "
                "clean, which resize"
            )
        with full_float32(self.device):
            x = preprocess(on_white(images.to(self.device)), self.preprocessing)
            with self._arithmetic():
                features = self._run(x)
        return {size: feature.float() for size, feature in features.items()}

    def _run(self, x: Tensor) -> dict[int, Tensor]:
        n = len(x)
        if self._compiled is None or n > self.batch_size:
            return self.network(x)
        if n < self.batch_size:
            x = torch.cat([x, _blank(self.batch_size - n).to(x)])
        return {size: feature[:n] for size, feature in self._compiled(x).items()}

    def _arithmetic(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _blank(n: int) -> Tensor:
    return torch.zeros(n, 3, INPUT_SIZE, INPUT_SIZE).contiguous(memory_format=torch.channels_last)


def fold_layers(features: Iterable[int], layers: dict[str, Layer], classifier: Tensor | None = None) -> Inception:
    """The network with `layers` folded into it, in evaluation mode."""
    with torch.device("meta"):  # the weights are assigned below: allocating and initializing them first is for nothing
        network = Inception(features)
    state = {}
    for name, module in network.named_modules():
        if isinstance(module, Conv):
            state[f"{name}.weight"], state[f"{name}.bias"] = layers[name].folded()
    if classifier is not None:
        state[f"{CLASSIFIER}.weight"] = classifier
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
