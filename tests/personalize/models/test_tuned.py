"""Opening adapters of other programs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.models.adapters import adapted_parts, attach_adapters  # noqa: E402
from improved_diffusion.personalize.models.base import load_base  # noqa: E402
from improved_diffusion.personalize.models.export import export_kohya  # noqa: E402
from improved_diffusion.personalize.models.tuned import load_adapter  # noqa: E402


def changes(base) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight."""
    return {
        f"{part}.{name}": layer.get_delta_weight("personalized")
        for part, module in adapted_parts(base).items()
        for name, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_layers_with_alphas_of_their_own(base, tmp_path):
    attach_adapters(base, AdapterConfig(rank=4, alpha=2.0), text_encoders=True)
    with torch.no_grad():
        for part in adapted_parts(base).values():
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    file = export_kohya(base, tmp_path)
    state = load_file(file)
    names = sorted(name for name in state if name.endswith(".alpha"))
    others = names[:3]
    for name in others:
        state[name] = torch.tensor(3.0)
    save_file(state, file)
    fresh = load_base(base.name)
    load_adapter(fresh, file)
    found, expected = changes(fresh), changes(base)
    assert set(found) == set(expected)
    differ = [name for name in expected if not torch.allclose(found[name], expected[name], atol=1e-6)]
    assert len(differ) == len(others)
    for name in differ:
        torch.testing.assert_close(found[name], 1.5 * expected[name], rtol=1e-5, atol=1e-6)


def test_a_damaged_file(base, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="is damaged, or of another architecture"):
        load_adapter(base, tmp_path / "a.safetensors")
