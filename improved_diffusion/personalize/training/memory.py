"""GPU memory that a run will need, computed before it starts.

A training step is run on PyTorch's meta device, where tensors have sizes but hold nothing: with the real architecture,
the real adapters and the arithmetic of a GPU. What is alive at its worst moment is added up, so that what the backward
pass does not need is not counted, and gradient checkpointing counts for what it keeps and what it computes again.

Left out are what a kernel uses within one operation, the fragmentation of the allocator, and what happens before and
between the steps: encoding the images, drawing pictures, and the networks that measure these.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.base import DTYPES, Base
from improved_diffusion.personalize.models.encoding import encode_texts, latent_moments
from improved_diffusion.personalize.models.trained import Trained, prepare

ALLOWANCE = 500_000_000  # bytes, of CUDA itself above all; a round figure, as it differs by GPU and driver
MOMENTS = {False: 2 * 4, True: 2 * 1}  # bytes of Adam's two for each parameter, by whether they are kept in 8 bits
# Bytes of a weight by its bits; in 4 bits, blocks of 64 share a float32 scale (Dettmers et al. 2023, arXiv:2305.14314).
QUANTIZED = {8: 1, 4: 1 / 2 + 4 / 64}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of GPU memory that a training step takes at its worst moment."""

    weights: int
    """All parts of the model on the GPU, each in its own type."""
    gradients: int
    """Of what is trained, in float32."""
    optimizer: int
    """Adam's moments."""
    averages: int
    """The moving average of what is trained."""
    activations: int
    """What the step needs beside all that. Gradients come as activations go, so that they share room; what is counted
    here is what does not fit into that of the gradients."""
    allowance: int = ALLOWANCE
    """For what is not counted."""

    @property
    def total(self) -> int:
        return sum(self._parts().values())

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {_amount(size)}" for name, size in self._parts().items() if size >= 1e6)
        return f"{parts} = {_amount(self.total)}"

    def _parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _amount(size: float) -> str:
    """Bytes as GB (10^9) or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def estimate_memory(base: Base, config: PersonalizeConfig) -> MemoryEstimate:
    """The memory of a run of `config` on one GPU.

    A precision of `auto` is taken for bf16, and buckets for the square, which is the largest of them.

    Args:
        base: as it was opened, with weights or on the meta device; it is left as it is.

    Raises:
        UserError: a token that does not fit, see `prepare`.
    """
    model = _without_weights(base)
    training = config.training
    precision = "bf16" if training.precision == "auto" else training.precision
    model.to("meta", precision, training.vae_precision)
    trained = prepare(model, config)
    peak = _peak_of_step(model, trained, config, DTYPES[precision])
    # The last layer of SDXL's first text encoder, for one, is not used, and has neither gradient nor moments.
    learning = sum(parameter.numel() for parameter in trained.parameters.values() if parameter.grad is not None)

    # The looks at a run draw pictures, so that all parts stay there.
    on_gpu = (model.unet, *model.text_encoders.values(), model.pipeline.vae)
    return MemoryEstimate(
        weights=sum(_weight_bytes(part, config.base_bits if part is model.unet else None) for part in on_gpu),
        gradients=4 * learning,
        optimizer=MOMENTS[training.adam_8bit] * learning,
        averages=0 if training.ema_rate is None else 4 * trained.count,
        activations=peak - 4 * learning,
    )


def require_memory(estimate: MemoryEstimate, available: int, config: PersonalizeConfig, device: str) -> None:
    """Raise UserError if a run of `config` needs more than the `available` bytes; it says what would need less.

    available: what is free on `device` before anything of the run is there.
    """
    if estimate.total <= available:
        return
    training, is_full = config.training, config.method == "full"
    remedies = {
        "training.gradient_checkpointing true": not training.gradient_checkpointing,
        "training.batch_size 1 and more training.accumulation": training.batch_size > 1,
        "training.precision bf16": training.precision == "float32",
        "images.cache true": not config.images.cache,
        "base_bits 4": not is_full and config.base_bits != 4,
        "training.adam_8bit true": is_full and not training.adam_8bit,
        "training.ema_rate null": is_full and training.ema_rate is not None,
        "train_text_encoder false": config.train_text_encoder,
        "method lora": is_full,
        "a smaller images.resolution": True,
    }
    raise UserError(
        f"training needs about {_amount(estimate.total)} and {device} has {_amount(available)} free; to need less: "
        + ", ".join(remedy for remedy, is_open in remedies.items() if is_open)
    )


def _without_weights(base: Base) -> Base:
    """The same architecture on the meta device."""
    pipeline = copy.copy(base.pipeline)
    with torch.device("meta"):
        for name in ("unet", "vae"):
            part = getattr(base.pipeline, name)
            setattr(pipeline, name, type(part).from_config(part.config))
        for name, encoder in base.text_encoders.items():
            setattr(pipeline, name, type(encoder)(encoder.config))
            tokenizer = name.replace("text_encoder", "tokenizer")  # textual inversion teaches it a word
            setattr(pipeline, tokenizer, copy.deepcopy(getattr(pipeline, tokenizer)))
    return Base(base.name, pipeline)


def _weight_bytes(part: nn.Module, bits: int | None) -> int:
    """Of `part`, the frozen linear layers of which are held in so many bits."""
    size = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    if bits is not None:
        weights = [m.weight for m in part.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        size += sum(round(QUANTIZED[bits] * weight.numel()) - weight.nbytes for weight in weights)
    return size


def _peak_of_step(model: Base, trained: Trained, config: PersonalizeConfig, dtype: torch.dtype) -> int:
    """Bytes of what forward and backward passes make, gradients among it, which stay."""
    if config.training.gradient_checkpointing:
        settings = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), _GPUArithmetic(dtype))}
        model.unet.enable_gradient_checkpointing(functools.partial(checkpoint, **settings))
        for encoder in model.text_encoders.values():
            encoder.gradient_checkpointing_enable(settings)
    for part in trained.parts:
        getattr(model.pipeline, part).train()
    with LiveBytes() as live:
        for _ in range(min(config.training.accumulation, 2)):  # in the second, there are gradients from the start
            _loss(model, config, dtype).backward()
    return live.peak


def _loss(model: Base, config: PersonalizeConfig, dtype: torch.dtype) -> Tensor:
    """Of a micro-batch, the images of the prior included."""
    count = config.training.batch_size * (2 if config.prior.images else 1)
    resolution = config.images.resolution or model.resolution
    side = resolution // model.pipeline.vae_scale_factor
    if not config.images.cache:
        with _GPUArithmetic():
            latent_moments(model, torch.empty(config.training.batch_size, 3, resolution, resolution, device="meta"))
    x_t = torch.empty(count, model.unet.config.in_channels, side, side, dtype=dtype, device="meta")
    t, size_ids = torch.empty(count, device="meta"), torch.empty(count, 6, device="meta")
    with _GPUArithmetic(dtype):
        with torch.set_grad_enabled(config.trains_text):
            conditions = encode_texts(model, [""] * count)
        added = {"text_embeds": conditions["pooled"], "time_ids": size_ids} if model.is_sdxl else None
        states = conditions["states"].to(dtype)
        predicted = model.unet(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added).sample
    return F.mse_loss(predicted.float(), x_t.float())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it, each from its making until its storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        result = func(*args, **kwargs)
        for storage in _storages(result) - given:  # what shares the storage of an argument is nothing new
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    """Of the tensors in `tree`."""
    return {leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}


class _GPUArithmetic(TorchFunctionMode):
    """What a GPU does with the operations of these networks, and the meta device does not.

    Attention and dropout are fused kernels, which make neither all of the attention matrix nor a mask of numbers. With
    `dtype` there is torch.autocast: linear layers, convolutions and attention are in that type, normalization is in
    float32, and each trained parameter is cast once.
    """

    LOWERED = (F.linear, F.conv2d, F.scaled_dot_product_attention)
    FLOAT32 = (F.group_norm, F.layer_norm)

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self._types: dict[Callable, torch.dtype] = {}
        if dtype is not None:
            self._types = {**dict.fromkeys(self.LOWERED, dtype), **dict.fromkeys(self.FLOAT32, torch.float32)}
        self._casts: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self._types:
            cast = functools.partial(self._cast, dtype=self._types[func])
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return FUSED.get(func, func)(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            return tensor.to(dtype)
        if tensor not in self._casts:
            self._casts[tensor] = tensor.to(dtype)
        return self._casts[tensor]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    # Like a GPU's kernels it keeps the inputs, the output and one number for each row, and it runs on the meta device.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


FUSED = {F.scaled_dot_product_attention: _fused_attention, F.dropout: _fused_dropout}
