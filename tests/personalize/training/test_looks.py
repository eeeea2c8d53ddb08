"""What `personalize.py train` makes of its looks at the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("no_estimate")


def test_pictures_of_one_colour_stop_the_run(train, tiny_bases, tmp_path):
    from improved_diffusion.personalize.models.base import load_base

    base = load_base(str(tiny_bases["sd"]))
    torch.nn.init.zeros_(base.pipeline.vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(base.pipeline.vae.decoder.conv_out.bias)
    base.pipeline.save_pretrained(tmp_path / "broken")
    outcome = train(tmp_path / "broken", "run")
    assert outcome.code == 2
    assert "error: at step 0 the model draws pictures of one colour (128, 128, 128)" in outcome.err


def test_copying_is_noticed_and_the_choice_precedes_it(train, tiny_bases, photos, tmp_path, monkeypatch):
    """From update 3 on the sampler returns training images, as a model that has learned them by heart would."""
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.personalize.data.crops import fit
    from improved_diffusion.personalize.models.encoding import rendered
    from improved_diffusion.personalize.training import watch

    images = [image.load() for image in open_captioned_set(photos).images]
    looks = []

    def draw(base, prompts, seeds, sampling, batch_size):
        looks.append(prompts)
        if len(looks) <= 3:  # of the base, and of updates 1 and 2
            return draw_really(base, prompts, seeds, sampling, batch_size)
        return [rendered(base, fit(images[seed], (64, 64))[0]) for seed in seeds]

    draw_really = watch.draw
    monkeypatch.setattr(watch, "draw", lambda base, prompts, *rest: draw(base, prompts, *rest) if prompts else [])
    vision = ("--watch.vision=inception", "--watch.every=1", "--watch.seeds=[0,1,2]", "--images.resolution=64")
    prompts = ('--watch.prompts=["a {token} {class}"]', "--watch.class_prompts=[]")
    outcome = train(tiny_bases["sd"], "run", *vision, *prompts, steps=4)
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: step")]
    assert [line.split(":")[1].strip() for line in warnings] == ["step 3", "step 4"]
    chosen = (tmp_path / "run" / "checkpoints" / "best").read_text().strip()
    assert chosen in ("step_0000001.pt", "step_0000002.pt")
    assert all(f"the best checkpoint is that of step {int(chosen[5:12])}" in line for line in warnings)
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [record["scores"]["copying"]["mean"] > 0.9 for record in records] == [False, False, False, True, True]


def records_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_other_looks_on_a_resume_are_a_new_series(train, resume, tiny_bases, tiny_judges, tmp_path):
    """What hardly learns has hardly moved from the base, on any seeds; and scores of other pictures choose nothing."""
    run = tmp_path / "run"
    looks = (
        *(f"--watch.vision={tiny_judges['dino']}", "--watch.every=1", "--watch.copy_cap=1"),  # to which all is alike
        "--training.keep_checkpoints=1",
    )
    assert train(tiny_bases["sd"], "run", *looks, "--training.lr=1e-9").code == 0
    best = (run / "checkpoints" / "best").read_text().strip()
    outcome = resume("run", "--training.steps=3", "--watch.seeds=[7,8]")
    assert outcome.code == 0, outcome.err
    assert "looks: a new series, not compared with the last one (other seeds)" in outcome.out
    records = records_of(run)
    assert [(record["step"], record["protocol"]["seeds"]) for record in records] == [
        *((step, [0]) for step in (0, 1, 2)),
        *((step, [7, 8]) for step in (2, 3)),  # the one of the checkpoint that it goes on from is looked at again
    ]
    assert all(max(record["values"]["drift"]) < 1e-3 for record in records)
    assert (run / "checkpoints" / "best").read_text().strip() in ("step_0000002.pt", "step_0000003.pt")
    assert (run / "checkpoints" / best).is_file()

    again = resume("run", "--training.steps=4")
    assert again.code == 0, again.err
    assert "series" not in again.out
    assert len(records_of(run)) == 6


def test_any_other_looks_can_be_taken_up(train, resume, tiny_bases, tiny_judges, tmp_path):
    looks = (f"--watch.vision={tiny_judges['dino']}", "--watch.every=1")
    assert train(tiny_bases["sd"], "run", *looks, steps=1).code == 0
    changes = ("--watch.class_prompts=[]", f"--watch.clip={tiny_judges['clip']}", "--watch.vision=null")
    for step, change in enumerate(changes, start=2):
        outcome = resume("run", f"--training.steps={step}", change)
        assert outcome.code == 0, outcome.err
        assert "a new series" in outcome.out
    assert [record["step"] for record in records_of(tmp_path / "run")] == [0, 1, 1, 2, 2, 3, 3, 4]


def test_looks_are_few_where_they_would_cost_too_much_and_none_by_choice(train, tiny_bases, tmp_path):
    looks = ("--watch.every=2", "--watch.seeds=[0,1]", "--watch.share=0.5")  # 16 evaluations, and 2 an update
    outcome = train(tiny_bases["sd"], "few", *looks, steps=24)
    assert outcome.code == 0, outcome.err
    assert "looks: 3 of 4 pictures, before training and then every 12 updates: 48 evaluations" in outcome.out
    assert [record["step"] for record in records_of(tmp_path / "few")] == [0, 12, 24]

    outcome = train(tiny_bases["sd"], "none", "--watch.every=null")
    assert outcome.code == 0, outcome.err
    assert "looks: none" in outcome.out
    assert records_of(tmp_path / "none") == []
    assert not list((tmp_path / "none" / "samples").glob("*.png"))
    assert (tmp_path / "none" / "checkpoints" / "step_0000002.pt").is_file()
