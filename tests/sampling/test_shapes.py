"""Grey and RGBA images that are not square go all the way: packed, trained on, drawn, shown and measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.data.compositing import on_white
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.packing import pack
from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.sampling.grids import make_grid


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_from_packing_to_measuring(channels, mode, tiny_set, tiny_config_file, tmp_path, run_script, monkeypatch):
    if packaged_weights() is None:
        pytest.skip("needs the Inception weights")
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    packed, run, out = tmp_path / "set", tmp_path / "run", tmp_path / "samples"
    pack(labelled_folder(tiny_set.parent / "files"), packed, (16, 24), channels, workers=1)

    def succeed(*command: object) -> None:
        outcome = run_script(*command)
        assert outcome.code == 0, outcome.err

    shape = ("--model.image_size=[16, 24]", f"--model.channels={channels}")
    trained = ("--data", packed, "--out", run, "--training.steps=2", "--evaluation.every=2")
    refused = run_script("train.py", "--config", tiny_config_file, *trained)
    assert refused.is_one_clear_line()
    assert f"take --model.image_size '[16, 24]' --model.channels {channels}" in refused.err
    succeed("train.py", "--config", tiny_config_file, *trained, *shape)
    assert Image.open(run / "samples" / "step_0000002.png").mode == "RGB"

    succeed("sample.py", "--run", run, "--n", 2, "--sampling-steps", 2, "--npz", "--out", out)
    samples = np.load(out / "samples.npz")["arr_0"]
    assert samples.shape == (6, 16, 24, channels)
    with Image.open(out / "apple_pie" / "seed0_000000.png") as image:
        assert (image.mode, image.size) == (mode, (24, 16))
        np.testing.assert_array_equal(np.atleast_3d(image), samples[0])

    # The same images, composited from their files by Pillow and drawn anew, composited by the extractor.
    result, drawn = tmp_path / "result.json", ("--sampling-steps", 2, "--generation-seed", 0)
    succeed("fid.py", out, run, "--features", 64, "--json", result, *drawn)
    assert json.loads(result.read_text())["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_grid_is_what_a_person_sees(channels):
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, channels), dtype=np.uint8)
    grid = make_grid(rows)
    assert grid.shape == (10, 21, 3)
    np.testing.assert_array_equal(grid[5:, 14:], on_white(torch.from_numpy(rows[1, 2])).numpy())
