"""Encoded images and texts on disk, found again by what they were made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor, nn

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.models.base import fingerprint

SUM_BYTES = hashlib.sha256().digest_size


class EncodedFiles:
    """What `networks` made, in `folder` or in the cache: those of other weights, or in another arithmetic, have files
    of their own."""

    def __init__(self, *networks: nn.Module, folder: str | None = None):
        made_how = [
            (n.device.type, str(n.dtype), getattr(n.config, "scaling_factor", None), *tiles_of(n)) for n in networks
        ]
        makers = hashlib.sha256(f"{fingerprint(*networks)} {made_how}".encode()).hexdigest()
        self.folder = (cache_directory() / "encoded" if folder is None else Path(folder)) / makers[:16]

    def find(self, key: object, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors, on the CPU, that are kept under `key`, plain values; or else those of `make`, kept from now on.
        A file that is damaged is made anew; where none can be written, there is none."""
        file = self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.tensors"
        with contextlib.suppress(OSError):
            written = file.read_bytes()
            if hashlib.sha256(written[SUM_BYTES:]).digest() == written[:SUM_BYTES]:
                return load(written[SUM_BYTES:])
        made = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
        content = save(made)
        with contextlib.suppress(UserError), atomic_write(file, durable=False) as temporary:
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
        return made


def tiles_of(network: nn.Module) -> tuple[int, ...]:
    """The pixels of a tile, where the network works in tiles."""
    return (network.tile_sample_min_size,) if getattr(network, "use_tiling", False) else ()
