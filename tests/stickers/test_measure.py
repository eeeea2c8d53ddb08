"""Sets of stickers beside each other, by a tiny random ViT."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from improved_diffusion.metrics import frechet_distance
from improved_diffusion.metrics.pairs import ergas
from improved_diffusion.personalize.data.captioned import open_captioned_set
from improved_diffusion.stickers.measure import measure_sets, open_extractor, paired


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    layers = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = ViTConfig(**layers, image_size=16, patch_size=8, num_labels=5, initializer_range=0.5)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    rng = np.random.default_rng(0)
    made = {name: tmp_path_factory.mktemp(name) for name in ("real", "near", "far")}
    for i in range(12):
        pixels = rng.integers(60, 200, (24, 24, 3))
        for name, noise in {"real": 0, "near": 10, "far": 55}.items():
            noisy = (pixels + rng.integers(-noise, noise + 1, pixels.shape)).astype(np.uint8)
            Image.fromarray(noisy).save(made[name] / f"{i}.png")
    return {name: open_captioned_set(folder) for name, folder in made.items()}


def test_values_are_those_of_their_definitions(vit, folders):
    extract = open_extractor(str(vit), "cpu")
    (near, far, same), notes = measure_sets(
        [folders[name] for name in ("near", "far", "real")], folders["real"], extract, None
    )
    assert not notes
    by_name = {value.metric: value for value in far}
    features = [extract(folders[name])[0].array.astype(np.float64) for name in ("real", "far")]
    moments = [moment for array in features for moment in (array.mean(axis=0), np.cov(array.T))]
    assert by_name["FID"].value == pytest.approx(frechet_distance(*moments), rel=1e-4)
    probabilities = torch.from_numpy(extract(folders["far"])[1].array).double().softmax(dim=1)
    divergence = (probabilities * (probabilities / probabilities.mean(dim=0)).log()).sum(dim=1).mean()
    assert by_name["Inception Score"].value == pytest.approx(divergence.exp().item())
    values = {
        name: [value.value for value in values if value.metric in ("FID", "ERGAS")]
        for name, values in {"near": near, "far": far, "same": same}.items()
    }
    assert (np.array(values["same"]) < np.array(values["near"])).all()
    assert (np.array(values["near"]) < np.array(values["far"])).all()


def test_pairs_are_found_by_name(folders):
    (value,) = paired(folders["near"], folders["real"], None)
    one = [
        [image.load().resize((256, 256), Image.Resampling.LANCZOS) for image in folders[name].images]
        for name in ("near", "real")
    ]
    assert (value.metric, value.value) == ("ERGAS", pytest.approx(ergas(*one).mean().item()))


def test_the_table_names_what_has_no_pair(vit, folders, run_script, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    for i in range(3):
        Image.new("RGB", (24, 24), (i * 80, 0, 0)).save(others / f"other{i}.png")
    near, real = (folders[name].path for name in ("near", "real"))
    command = ("measure", near, others, f"--reference={real}", f"--features={vit}", f"--csv={tmp_path / 'a.csv'}")
    outcome = run_script("stickers.py", *command)
    assert outcome.code == 0, outcome.err
    assert "| others | 3 |" in outcome.out
    assert "has no other0 to compare with" in outcome.out
    metrics = [row["metric"] for row in csv.DictReader((tmp_path / "a.csv").open())]
    assert metrics == ["Inception Score", "FID", "ERGAS", "Inception Score", "FID"]


def test_another_network_is_refused(tiny_judges, folders, run_script):
    path = folders["real"].path
    outcome = run_script("stickers.py", "measure", path, f"--reference={path}", f"--features={tiny_judges['clip']}")
    assert outcome.is_one_clear_line()
    assert "is no ViT classifier" in outcome.err
