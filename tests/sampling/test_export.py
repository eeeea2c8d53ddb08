"""An exported model is the run's, to the bit, and says where it comes from; a damaged one is refused."""

from __future__ import annotations

import contextlib
import functools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import improved_diffusion
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.sampling import export
from improved_diffusion.sampling.model_file import export as export_model
from improved_diffusion.sampling.model_file import read_model_file

FEW = {"sampler": "ddim", "steps": 2, "show_progress": False}


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "tiny.safetensors"
    export.main([str(tiny_run), "--out", str(file)])
    return file


def test_it_draws_the_pictures_of_the_run(tiny_run, exported):
    run, file = improved_diffusion.load(tiny_run), improved_diffusion.load(exported)
    assert (run.sample(n=2, **FEW) == file.sample(n=2, **FEW)).all()
    assert (file.config, file.class_names, file.step, file.ema_rate) == (run.config, run.class_names, 1, None)
    assert file.name == "tiny"


def test_it_says_where_it_comes_from(tiny_run, exported):
    provenance = improved_diffusion.load(exported).provenance
    assert provenance["run"] == tiny_run.name
    assert provenance["checkpoint"] == "step_0000001.pt"
    assert provenance["checkpoint_sha256"] == file_sha256(tiny_run / "checkpoints" / "step_0000001.pt")
    assert provenance["exported_by"]["version"] == improved_diffusion.__version__
    with safe_open(exported, "np") as opened:  # any program that reads such files
        assert json.loads(opened.metadata()["improved_diffusion"])["config"]["model"]["num_channels"] == 32


def test_others_may_read_it(exported, tmp_path):
    (tmp_path / "any").touch()
    assert exported.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_the_command_lines_take_it(tiny_run, exported, run_script, tmp_path):
    images = []
    for model in (tiny_run, exported):
        out = tmp_path / model.stem
        few = ("--n", 1, "--sampler", "ddim", "--sampling-steps", 2, "--npz")
        outcome = run_script(
            "sample.py", "--run", model, *few, "--guide", exported, "--guidance-scale", 1.5, "--out", out
        )
        assert outcome.code == 0, outcome.err
        images.append(np.load(out / "samples.npz")["arr_0"])
    assert (images[0] == images[1]).all()
    refused = run_script("fid.py", exported, exported)
    assert refused.is_one_clear_line(), refused
    assert "two runs" in refused.err


def test_it_draws_as_the_flags_say(tiny_run, tmp_path):
    flags = ("--guidance-scale", "1.5", "--sampler", "dpmpp_2m", "--sampling.options", "eta=1", "--sampling-steps", "3")
    export.main([str(tiny_run), "--out", str(tmp_path / "guided.safetensors"), *flags])
    run, file = improved_diffusion.load(tiny_run), improved_diffusion.load(tmp_path / "guided.safetensors")
    as_flags_say = {"guidance_scale": 1.5, "sampler": "dpmpp_2m", "options": {"eta": 1.0}, "steps": 3}
    assert (file.sample(n=2, show_progress=False) == run.sample(n=2, show_progress=False, **as_flags_say)).all()


def test_the_model_that_ships_survives_in_half_the_space(tmp_path):
    """Its weights are kept in float16."""
    shipped = improved_diffusion.load("pretrained")
    export_model(shipped, tmp_path / "half.safetensors", half=True)
    again = improved_diffusion.load(tmp_path / "half.safetensors")
    few = {"classes": [0], "n": 2, "steps": 1, "show_progress": False}
    assert (again.sample(**few) == shipped.sample(**few)).all()
    assert (tmp_path / "half.safetensors").stat().st_size < 16e6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "tiny.pt"], "must end in .safetensors"),
        (["--out", "there.safetensors"], "exists already"),
        (["--out", "new.safetensors", "--ema=0.9"], "it has none"),
        (["--out", "new.safetensors", "--checkpoint=best"], "no best checkpoint"),
        (["--out", "new.safetensors", "--sampling-steps=100000"], "must not exceed diffusion.timesteps"),
    ],
)
def test_what_cannot_be_exported_is_refused(tiny_run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(UserError, match=words):
        export.main([str(tiny_run), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_another_average_or_a_checkpoint_of_it_is_refused(exported):
    for wrong in ({"ema": 0.9}, {"checkpoint": "best"}):
        with pytest.raises(UserError, match=r"tiny\.safetensors"):
            improved_diffusion.load(exported, **wrong)


def test_a_file_of_another_program_is_refused(tmp_path, run_script):
    save_file({"weight": np.zeros(3)}, tmp_path / "lora.safetensors")
    outcome = run_script("sample.py", "--run", tmp_path / "lora.safetensors")
    assert outcome.is_one_clear_line(), outcome
    assert "holds no model of this project" in outcome.err
    assert run_script("sample.py", "--run", tmp_path / "none.safetensors").is_one_clear_line()


@functools.cache
def what_was_exported(file):
    return read_model_file(file)


@settings(max_examples=25, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_a_changed_bit_is_found_or_changes_nothing(exported, tmp_path_factory, place, bit, in_header):
    content = bytearray(exported.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[int(place * (header if in_header else len(content)))] ^= 1 << bit
    spoilt = tmp_path_factory.mktemp("spoilt") / "tiny.safetensors"
    spoilt.write_bytes(content)
    card, weights = what_was_exported(exported)
    with contextlib.suppress(UserError):
        read_card, read_weights = read_model_file(spoilt)
        assert read_card == card
        assert read_weights.keys() == weights.keys()
        assert all(torch.equal(read_weights[name], weights[name]) for name in weights)


def test_a_file_cut_short_is_refused(exported, tmp_path):
    content = exported.read_bytes()
    for share in (0, 0.001, 0.5, 0.999):
        (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"cut\.safetensors is damaged"):
            improved_diffusion.load(tmp_path / "cut.safetensors")


def test_weights_that_half_precision_cannot_hold_are_refused(tiny_run, tmp_path):
    model = improved_diffusion.load(tiny_run)
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] = 1e6
    with pytest.raises(UserError, match="larger than float16 can hold: export without --half"):
        export_model(model, tmp_path / "half.safetensors", half=True)
    export_model(model, tmp_path / "whole.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["whole.safetensors"]
