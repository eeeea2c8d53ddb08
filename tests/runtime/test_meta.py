"""What is known of operations on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from improved_diffusion.personalize.training.emulation import LiveBytes
from improved_diffusion.runtime.meta import KnownLayouts


def operations() -> tuple[list[Tensor], int, int]:
    """New tensors, views, sums in place and gradients; and what was alive at the end and at the most."""
    x = torch.empty(2, 8, 6, device="meta", requires_grad=True)
    weight, counts = torch.empty(8, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        grouped = F.group_norm(x.transpose(1, 2).contiguous(), 2).transpose(1, 2)
        whole = torch.native_layer_norm(grouped, (6,), None, None, 1e-5)[0] * weight[:, None] + 1
        made = [whole, counts + 1, counts + 1.0, counts.view(2, 2), counts.add_(1), x.detach()[:, :4], x.sum(0, True)]
        whole.sum().backward()
        assert made[4] is counts
        assert made[3].untyped_storage() is counts.untyped_storage()
    return [*made, x.grad], live.now, live.peak


def test_it_changes_nothing(monkeypatch):
    monkeypatch.setattr(KnownLayouts, "_known", {})
    expected, *expected_bytes = operations()
    for _ in range(2):
        with KnownLayouts():
            found, *found_bytes = operations()
        assert found_bytes == expected_bytes
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_what_is_known_is_not_found_again(monkeypatch):
    monkeypatch.setattr(KnownLayouts, "_known", known := {})
    with KnownLayouts():
        operations()
    before = dict(known)
    assert any(key[0][1] is torch.ops.aten.native_group_norm.default for key in before)
    with KnownLayouts():
        operations()
    assert known == before


def test_only_of_the_meta_device(monkeypatch):
    """Elsewhere results hold something, and their layouts may depend on it."""
    monkeypatch.setattr(KnownLayouts, "_known", known := {})
    with KnownLayouts():
        x = torch.tensor([1.0, 0.0, 2.0])
        assert (x + 1).tolist() == [2.0, 1.0, 3.0]
        assert len(x[x > 0]) == 2
    assert not known
