"""The image of (seed, class, number) depends on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.training.generate import SampleKey, generate, load_model, model_denoiser


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_set):
    """A run whose weights are not at their start, where the output is zero."""
    import yaml

    from improved_diffusion.config import load_config
    from improved_diffusion.data import open_image_set
    from improved_diffusion.run_directory import RunDirectory
    from improved_diffusion.training.model import build_network

    run = RunDirectory(tmp_path_factory.mktemp("run"))
    settings = {
        "data": str(tiny_set),
        "model": {
            "image_size": 16,
            "num_channels": 32,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [8],
            "class_dropout": 0.1,
        },
        "diffusion": {"timesteps": 20},
        "training": {"precision": "float32"},
    }
    run.config_file.write_text(yaml.safe_dump(settings))
    config = load_config(run.config_file)
    network = build_network(config, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    class_names = list(open_image_set(tiny_set).class_names)
    state = {"step": 1, "model": network.state_dict(), "ema": {}, "class_names": class_names}
    run.save_checkpoint(state, keep=1)
    return run.path


def draw(run, keys, **settings) -> np.ndarray:
    import dataclasses

    model = load_model(run, torch.device("cpu"))
    sampling = dataclasses.replace(model.config.sampling, **settings)
    denoiser = model_denoiser(model, sampling, torch.device("cpu"))
    batches = generate(denoiser, keys, model.config, sampling, torch.device("cpu"))
    return np.concatenate([images.numpy() for _, images in batches])


KEYS = [SampleKey(0, label, number) for label in range(3) for number in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ancestral"},
        {"sampler": "ancestral", "steps": 7, "guidance_scale": 2.0},
        {"sampler": "ddim", "steps": 5},
        {"sampler": "ancestral", "steps": 1},
    ],
)
def test_an_image_does_not_depend_on_the_batch(tiny_run, settings):
    whole = draw(tiny_run, KEYS, batch_size=64, **settings)
    by_fours = draw(tiny_run, KEYS, batch_size=4, **settings)
    alone = np.concatenate([draw(tiny_run, [key], batch_size=1, **settings) for key in KEYS])
    backwards = draw(tiny_run, KEYS[::-1], batch_size=2, **settings)[::-1]
    for other in (by_fours, alone, backwards):
        # Arithmetic may differ in the last digits with the size of the batch, and so a pixel by one level.
        assert np.abs(whole.astype(int) - other.astype(int)).max() <= 1
        assert (whole == other).mean() > 0.999


def test_images_differ_by_seed_class_and_number(tiny_run):
    keys = [SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1)]
    images = draw(tiny_run, keys, sampler="ddim", steps=5).astype(int)
    for i in range(4):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 5


def test_two_processes_write_the_images_of_one(tiny_run, finish_script, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        finish_script("sample.py", "--run", tiny_run, "--n", 3, "--npz", "--out", out, processes=processes)
    one, two = (np.load(tmp_path / str(n) / "samples.npz") for n in (1, 2))
    assert one["arr_0"].shape == (9, 16, 16, 3)
    assert one["labels"].tolist() == two["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int)).max() <= 1


def test_files(tiny_run, run_script, tmp_path):
    arguments = ("--run", tiny_run, "--class", "waffles", "--n", 2, "--seed", 5, "--out", tmp_path / "out")
    outcome = run_script("sample.py", *arguments)
    assert outcome.code == 0, outcome.err
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["out.png", "out/waffles/seed5_000000.png", "out/waffles/seed5_000001.png"]
    expected = draw(tiny_run, [SampleKey(5, 2, 0), SampleKey(5, 2, 1)])
    for number in range(2):
        image = np.asarray(Image.open(tmp_path / "out" / "waffles" / f"seed5_{number:06d}.png"))
        assert np.abs(image.astype(int) - expected[number].astype(int)).max() <= 1
