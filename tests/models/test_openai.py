"""Import of openai/improved-diffusion's checkpoints, against outputs of the original code.

How the fixtures were made, with the original's `unet.py` at commit 1bc7bbb: `conditional.npz` and `unconditional.npz`
hold the names and shapes of the state dict of a small `UNetModel` (use_scale_shift_norm=True) and its float32 output
for the input below, with every weight, the zero-initialised ones too, replaced by `draw(name, shape)`. The `.txt.gz`
files list the names and shapes of the models that its README publishes (imagenet64_uncond: 128 channels, 3 residual
blocks, learned sigma; imagenet64_cond: 192 channels, 3 residual blocks, learned sigma, 1000 classes).
"""

from __future__ import annotations

import gzip
import re
import runpy
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.models.openai import load_checkpoint
from improved_diffusion.models.openai.conversion import LAYERS, STAGES, infer_settings, original_name, original_shape
from improved_diffusion.models.unet import UNet
from improved_diffusion.run_directory import RunDirectory

FIXTURES = Path(__file__).parent / "fixtures"
CONDITIONAL = {"image_size": 32, "num_heads": 4, "num_classes": 5}
UNCONDITIONAL = {"image_size": 64, "num_heads": 2, "num_classes": None}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Reproducible weights of sensible variance: 1 / fan-in for matrices, near 1 for gains, near 0 for biases."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return torch.from_numpy(values / np.sqrt(np.prod(shape[1:]), dtype=np.float32))
    return torch.from_numpy(np.float32(0.2) * values + np.float32(name.endswith("weight")))


def golden(label: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The original's state dict and its output."""
    with np.load(FIXTURES / f"{label}.npz") as fixture:
        shapes = [tuple(map(int, text.split())) for text in fixture["shapes"]]
        weights = {str(n): draw(str(n), shape) for n, shape in zip(fixture["names"], shapes, strict=True)}
        return weights, torch.from_numpy(fixture["output"])


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return golden("conditional")[0]


def saved(weights: object, tmp_path: Path) -> Path:
    file = tmp_path / "checkpoint.pt"
    torch.save(weights, file)
    return file


@pytest.mark.parametrize(("label", "settings"), [("conditional", CONDITIONAL), ("unconditional", UNCONDITIONAL)])
def test_outputs_are_the_originals(label, settings, tmp_path):
    weights, output = golden(label)
    network = load_checkpoint(saved(weights, tmp_path), num_heads=settings["num_heads"])
    size = settings["image_size"]
    x_t = draw("x_t", (2, 3, size, size)) * np.sqrt(3 * size**2)
    y = torch.tensor([1, 4]) if settings["num_classes"] else None
    with torch.no_grad():
        own = network(x_t, torch.tensor([3.25, 977.0]), y)
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.image_size == size
    assert network.num_classes == settings["num_classes"]
    torch.testing.assert_close(own, output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("label", "num_channels", "num_classes", "millions"),
    [("imagenet64_uncond", 128, None, 121.1), ("imagenet64_cond", 192, 1000, 273.1)],
)
def test_published_models_have_precisely_our_names_and_shapes(label, num_channels, num_classes, millions):
    lines = gzip.decompress((FIXTURES / f"{label}.txt.gz").read_bytes()).decode().splitlines()
    published = {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines)}
    with torch.device("meta"):
        network = UNet(
            image_size=64, num_channels=num_channels, num_res_blocks=3, num_classes=num_classes, out_channels=6
        )
        weights = {name: torch.empty(shape) for name, shape in published.items()}
    own = {original_name(name): original_shape(name, p.shape) for name, p in network.named_parameters()}
    assert own == published
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
    settings = infer_settings(weights, image_size=None, num_heads=4)
    with torch.device("meta"):
        inferred = UNet(**settings)
    assert {n: p.shape for n, p in inferred.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    assert (settings["image_size"], settings["attention_resolutions"]) == (64, (16, 8))


def test_the_table_of_names_can_be_read_backwards():
    """No two of our names become one of theirs, and the inverse table leads back."""
    with torch.device("meta"):
        names = [n for n, _ in UNet(image_size=64, num_classes=3).named_parameters()]
    stages = {there: here for here, there in STAGES.items()}
    layers = {there: here for here, there in LAYERS.items()}
    assert (len(stages), len(layers)) == (len(STAGES), len(LAYERS))
    pattern = re.compile(rf"({'|'.join(stages)})((?:\.\d+)*?)(?:\.({'|'.join(layers)}))?\.(weight|bias)")
    for name in names:
        stage, positions, layer, kind = pattern.fullmatch(original_name(name)).groups()
        assert stages[stage] + positions + (f".{layers[layer]}" if layer else "") + f".{kind}" == name


def test_half_precision_weights_become_float32(weights, tmp_path):
    halves = {name: tensor.half() for name, tensor in weights.items()}
    network = load_checkpoint(saved(halves, tmp_path))
    torch.testing.assert_close(network.output_conv.weight, halves["out.2.weight"].float(), atol=0, rtol=0)
    assert network.output_conv.weight.dtype == torch.float32


def without_scale_shift(weights):
    return {n: t.chunk(2)[0] if ".emb_layers." in n else t for n, t in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if n != "middle_block.1.norm.bias"}, r"1 missing \(middle_block.1.norm"),
        (lambda w: {**w, "input_blocks.99.0.h_upd.weight": torch.zeros(1)}, r"1 unknown \(input_blocks.99.0.h_upd"),
        (lambda w: {**w, "out.2.bias": torch.zeros(5)}, r"1 of another shape \(out.2.bias\)"),
        (lambda w: {n: t for n, t in w.items() if not n.startswith("input_blocks.1.")}, "cannot import"),
        (lambda w: {n: t for n, t in w.items() if not n.startswith("input_blocks.0.")}, "no input_blocks.0.0.weight"),
        (lambda w: {**w, "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "upsampling"),
        (lambda w: {n.replace(".0.op.", ".0.in_layers.2."): t for n, t in w.items()}, "guided-diffusion"),
        (without_scale_shift, "use_scale_shift_norm"),
        (lambda w: {"model": w, "step": 3}, "state dict"),
        (lambda w: list(w.values()), "state dict"),
        (lambda w: {}, "no input_blocks.0.0.weight"),
    ],
)
def test_other_architectures_are_refused_with_what_differs(change, message, weights, tmp_path):
    file = saved(change(weights), tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("settings", [{"num_heads": 5}, {"image_size": 33}, {"image_size": 4}])
def test_settings_that_do_not_fit_the_weights_are_refused(settings, weights, tmp_path):
    with pytest.raises(UserError, match="cannot import .*(num_heads|image_size)"):
        load_checkpoint(saved(weights, tmp_path), **settings)


def test_image_size_can_be_given(weights, tmp_path):
    network = load_checkpoint(saved(weights, tmp_path), image_size=16)
    assert network(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 6, 16, 16)


def test_damaged_files_are_refused(weights, tmp_path):
    file = saved(weights, tmp_path)
    whole = file.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:100]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(file))):
            load_checkpoint(file)
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_checkpoint(path)


def test_command_line_makes_a_run_directory(weights, tmp_path, monkeypatch, capsys):
    file, out = saved(weights, tmp_path), tmp_path / "run"

    def command(*flags: str) -> int:
        """`python -m improved_diffusion.models.openai FILE --out OUT`, in this process."""
        monkeypatch.setattr(sys, "argv", ["openai", str(file), "--out", str(out), *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("improved_diffusion.models.openai", run_name="__main__")
        return stop.value.code

    assert command("--schedule", "linear", "--timesteps", "1000") == 0
    run = RunDirectory(out)
    config, state = run.read_config(), read_checkpoint(run.latest_checkpoint())
    assert (config.diffusion.schedule, config.diffusion.timesteps) == ("linear", 1000)
    assert (config.diffusion.variance, config.diffusion.prediction) == ("learned_range", "eps")
    assert (config.model.image_size, config.model.num_channels, config.model.class_conditional) == (32, 32, True)
    assert len(state["class_names"]) == 5
    network = load_checkpoint(file)
    assert state["model"].keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(state["model"][name], tensor, atol=0, rtol=0)
    assert command() == 2
    assert "already holds a run" in capsys.readouterr().err
