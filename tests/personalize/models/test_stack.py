"""Several adapters on one base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.generate import Sampling, draw  # noqa: E402
from improved_diffusion.personalize.models.adapters import (  # noqa: E402
    adapted_parts,
    attach_adapters,
    set_scales,
    trainable,
)
from improved_diffusion.personalize.models.base import Base  # noqa: E402
from improved_diffusion.personalize.models.export import export_diffusers, export_kohya  # noqa: E402
from improved_diffusion.personalize.models.stack import Stacked, attach_stack  # noqa: E402
from improved_diffusion.personalize.models.tuned import load_adapter  # noqa: E402


def picture(base: Base) -> np.ndarray:
    return np.asarray(next(draw(base, ["a dog"], [0], Sampling(steps=2))), dtype=np.int16)


@torch.no_grad()
def write(base: Base, folder: Path, seed: int, export=export_kohya, **settings) -> Path:
    """The file of adapters of those settings, not zero; `base` has them then."""
    attach_adapters(base, AdapterConfig(rank=2 + seed, alpha=3.0, **settings), text_encoders=True)
    generator = torch.Generator().manual_seed(seed)
    for part in adapted_parts(base).values():
        for parameter in trainable(part):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return export(base, folder)


@pytest.fixture(scope="module")
def files(fresh_base, tmp_path_factory) -> list[Path]:
    """Of two LoRA, of other ranks and layers, in either form."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write(fresh_base("sd"), folder / "a", 0, targets="kohya"),
        write(fresh_base("sd"), folder / "b", 1, export_diffusers, targets="attention+feedforward"),
    ]


@torch.no_grad()
def test_the_changes_of_all_are_added_by_weight(fresh_base, files):
    merged = fresh_base("sd")
    for file, weight in zip(files, (0.5, -0.75), strict=True):
        other = fresh_base("sd")
        load_adapter(other, file)
        for name, part in adapted_parts(other).items():
            network = merged.unet if name == "unet" else merged.text_encoders[name]
            for path, layer in part.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    network.get_submodule(path).weight += weight * layer.get_delta_weight("personalized")
    base = fresh_base("sd")
    attach_stack(base, [Stacked(files[0], 0.5), Stacked(files[1], -0.75)])
    found = picture(base)
    assert np.abs(found - picture(merged)).max() <= 1
    assert np.abs(found - picture(fresh_base("sd"))).max() > 1


def test_one_of_weight_zero_is_as_good_as_not_there(fresh_base, files):
    alone, stacked, nothing = (fresh_base("sd") for _ in range(3))
    load_adapter(alone, files[0])
    set_scales(alone, 0.5, 0.5)
    attach_stack(stacked, [Stacked(files[0], 0.5), Stacked(files[1], 0.0)])
    assert np.array_equal(picture(stacked), picture(alone))
    attach_stack(nothing, [Stacked(file, 0.0) for file in files])
    assert np.array_equal(picture(nothing), picture(fresh_base("sd")))


def test_a_dora_beside_others(fresh_base, files, tmp_path):
    dora = write(fresh_base("sd"), tmp_path / "dora", 2, dora=True)
    pictures = []
    for stack in ([files[0], dora], [dora, files[0]]):
        base = fresh_base("sd")
        attach_stack(base, [Stacked(file, 1.0) for file in stack])
        pictures.append(picture(base))
    assert np.array_equal(*pictures)
    with pytest.raises(UserError, match=r"DoRA cannot be weighed by 0\.5"):
        attach_stack(fresh_base("sd"), [Stacked(files[0], 1.0), Stacked(dora, 0.5)])
    with pytest.raises(UserError, match="only one may be a DoRA"):
        attach_stack(fresh_base("sd"), [Stacked(dora, 1.0), Stacked(dora, 1.0)])


def test_the_command_line_draws_with_all(run_script, fresh_base, files, tiny_bases, tmp_path):
    def generate(*adapters: str):
        where = (f"--base={tiny_bases['sd']}", f"--out={tmp_path / 'out'}")
        return run_script("personalize.py", "generate", "a dog", "--n=1", "--steps=2", *where, "--adapters", *adapters)

    outcome = generate(f"{files[0]}:0.5", str(files[1]))
    assert outcome.code == 0, outcome.err
    base = fresh_base("sd")
    attach_stack(base, [Stacked(files[0], 0.5), Stacked(files[1], 1.0)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "0000.png")), picture(base))
    assert [weight for _, weight in json.loads((tmp_path / "out" / "manifest.json").read_text())["adapters"]] == [
        0.5,
        1,
    ]
    outcome = generate(f"{files[0]}:0.6", str(files[1]))
    assert outcome.code == 2
    assert "were drawn with adapters" in outcome.err
