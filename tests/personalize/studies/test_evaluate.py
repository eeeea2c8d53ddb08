"""Evaluation of a folder of pictures through the command line, against the functions of metrics/."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
from improved_diffusion.metrics.similarity import clip_i, clip_score, dino  # noqa: E402
from improved_diffusion.personalize.models.judges import load_clip, load_vision  # noqa: E402

PROMPTS = ("a red ball", "a ball in the snow")


@pytest.fixture
def generated(tmp_path):
    """Four noisy pictures of two prompts."""
    folder = tmp_path / "generated"
    folder.mkdir()
    generator = np.random.default_rng(0)
    records = []
    for number in range(4):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        records.append({"file_name": f"{number}.png", "text": PROMPTS[number // 2]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def evaluate(run_script, generated, photos, tiny_judges, tmp_path):
    def run(*flags: str):
        judges = (f"--clip={tiny_judges['clip']}", f"--vision={tiny_judges['dino']}")
        where = (str(generated), f"--references={photos}", f"--json={tmp_path / 'out.json'}")
        return run_script("personalize.py", "evaluate", *where, *judges, *flags)

    return run


def squares(folder) -> list[Image.Image]:
    images = []
    for file in sorted(folder.glob("*.png")):
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        images.append(image.crop((left, top, left + side, top + side)))
    return images


@pytest.mark.parametrize("tokens", [(), ("in", "red")])
def test_similarities_are_those_of_metrics(evaluate, generated, photos, tiny_judges, tmp_path, tokens):
    outcome = evaluate("--metrics", "clip-t", "clip-i", "likeness", *(("--tokens", *tokens) if tokens else ()))
    assert outcome.code == 0, outcome.err
    found = {record["metric"]: record for record in json.loads((tmp_path / "out.json").read_text())}
    pictures, real = squares(generated), squares(photos)
    clip, vision = load_clip(str(tiny_judges["clip"])), load_vision(str(tiny_judges["dino"]))
    texts = [" ".join(word for word in PROMPTS[i // 2].split() if word not in tokens) for i in range(4)]
    cosines = clip_score(pictures, texts, *clip) / 100
    assert (cosines > 0).all()  # clip_score cuts negative ones, CLIP-T does not
    expected = {
        "CLIP-T": cosines.mean().item(),
        "CLIP-I": clip_i(pictures, real, *clip).mean().item(),
        "DINO": dino(pictures, real, *vision).mean().item(),
    }
    for name, value in expected.items():
        assert found[name]["score"]["mean"] == pytest.approx(value, abs=1e-4)
        assert found[name]["score"]["n"] == 4
    assert found["DINO"]["n_references"] == 5


def test_copies_are_found(evaluate, generated, photos):
    for number, square in enumerate(squares(photos)[:4]):
        square.save(generated / f"{number}.png")
    outcome = evaluate("--metrics", "copying", "likeness")
    assert outcome.code == 0, outcome.err
    assert "copying       1.0000      1.0000 to 1.0000       4           5" in outcome.out


def test_kid_comes_before_fid_which_is_said_to_be_biased(evaluate):
    outcome = evaluate("--metrics", "fid", "kid")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[1].startswith("KID")
    assert lines[2].startswith("FID")
    assert "FID: 4 images for 2048 features: the covariance is singular" in outcome.out


def test_what_is_refused_does_not_keep_the_rest(evaluate):
    outcome = evaluate("--metrics", "clip-t", "lpips")
    assert outcome.is_one_clear_line()
    assert "lpips needs torchvision's AlexNet weights" in outcome.err
    assert "CLIP-T" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--references=nowhere",), "there is no folder or parquet file of images at nowhere"),
        (("--clip=nowhere",), "the CLIP model nowhere does not exist"),
        (("--metrics", "fidd"), "invalid choice: 'fidd'"),
        (("--metrics", "inception-score", "--weights=nowhere.pth"), "no Inception weights at nowhere.pth"),
        (("--metrics", "likeness", "--vision=inception", "--weights=nowhere.pth"), "no Inception weights at nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(evaluate, flags, message):
    outcome = evaluate(*flags)
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


def test_a_library_that_is_missing(run_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    outcome = run_script("personalize.py", "evaluate", str(tmp_path / "data.parquet"))
    assert outcome.is_one_clear_line(), outcome.err
    assert "is missing: in the checkout, pip install -e '.[personalize]'" in outcome.err


def test_the_command_offers_what_there_is():
    from improved_diffusion.personalize.commands.evaluate import METRICS
    from improved_diffusion.personalize.studies.evaluate import INCEPTION_METRICS, SIMILARITY_METRICS

    assert (*SIMILARITY_METRICS, *INCEPTION_METRICS) == METRICS


def test_diversity_is_the_mean_distance_within_a_prompt(generated, monkeypatch):
    """With a distance that is easy to see: the mean absolute difference."""
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.personalize.studies import evaluate

    class Difference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return self.scale * (a - b).abs().mean(dim=(1, 2, 3))

    monkeypatch.setattr(evaluate, "load_lpips", lambda weights, device: Difference().eval())
    monkeypatch.setattr(evaluate, "LPIPS_SIDE", 64)
    found = evaluate.Similarities(open_captioned_set(generated), None, None, (), generated).measure("lpips")
    arrays = [np.asarray(Image.open(generated / f"{i}.png"), dtype=np.float64) / 127.5 for i in range(4)]
    expected = np.mean([np.abs(arrays[0] - arrays[1]).mean(), np.abs(arrays[2] - arrays[3]).mean()])
    assert found.score.mean == pytest.approx(expected, rel=1e-4)
    assert found.score.n == 4
