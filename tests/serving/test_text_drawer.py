"""Pictures of texts by a base and its styles, as personalize.py draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import AdapterConfig, PersonalizeConfig, SubjectConfig
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models import tuned as tuned_module
from improved_diffusion.personalize.models.adapters import set_scales
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.serving.config import ModelsConfig
from improved_diffusion.serving.drawers import open_drawers
from improved_diffusion.serving.requests import ImageRequest, TextRequest
from improved_diffusion.serving.text_drawer import AdapterCache
from improved_diffusion.serving.uploads import keep_upload
from tests.serving.conftest import wait_until
from tests.serving.test_uploads import JPEG

RANKS = {"dog": 2, "cat": 3, "ink": 4}  # of each style
FEW = {"steps": 2, "guidance_scale": 3.0}


def make_run(base: Base, folder: Path, name: str) -> RunDirectory:
    """A LoRA run on a base, which gets its adapters too: random ones, for `dog` of the text encoders as well."""
    config = PersonalizeConfig(
        base=base.name,
        adapter=AdapterConfig(rank=RANKS[name]),
        train_text_encoder=name == "dog",
        subject=SubjectConfig("sks", "dog"),
    )
    run, trained = RunDirectory(folder / name), prepare(base, config)
    generator = torch.Generator().manual_seed(RANKS[name])
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    run.write_config(config, [{}])
    run.save_checkpoint({"step": 1, "model": trained.state_dict(), "ema": {}}, keep=1)
    return run


def arrays(pictures) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


def test_styles_come_and_go_without_a_trace(fresh_base, tmp_path):
    """Each draws what a model of its own draws, whatever was used before it; the least recently used leaves first."""
    how = Sampling(2, 3.0)
    base = fresh_base()
    expected, runs = {None: arrays(draw(base, ["a dog"], [1], how))}, {}
    for name in RANKS:
        own = fresh_base()
        runs[name] = make_run(own, tmp_path, name)
        expected[name] = arrays(draw(own, ["a dog"], [1], how))
        assert np.abs(expected[name][0].astype(int) - expected[None][0]).max() > 0
    sizes = {}
    for name in RANKS:
        single = AdapterCache(base, runs, 0)
        single.use(name)
        sizes[name] = single.nbytes
        single.clear()
        assert not [key for key, _ in base.unet.named_parameters() if "lora" in key]
    cache = AdapterCache(base, runs, sum(sizes.values()) - 1)  # any two, not three
    names = ("dog", "cat", None, "dog", "ink", "cat")
    kept = ("dog", "dog cat", "dog cat", "dog cat", "dog ink", "cat ink")
    for name, there in zip(names, kept, strict=True):
        cache.use(name)
        np.testing.assert_array_equal(arrays(draw(base, ["a dog"], [1], how)), expected[name], err_msg=str(name))
        assert [style for style in RANKS if style in cache] == there.split()
        assert cache.nbytes == sum(sizes[style] for style in there.split())
    with pytest.raises(UserError, match="no style 'gone' any more"):
        cache.use("gone")
    cache.clear()
    cache.use(None)
    np.testing.assert_array_equal(arrays(draw(base, ["a dog"], [1], how)), expected[None])


def test_runs_that_share_no_base_are_refused(fresh_base, tmp_path):
    base = fresh_base()
    whole = RunDirectory(tmp_path / "whole")
    whole.write_config(PersonalizeConfig(base=base.name, method="full"), [{}])
    with pytest.raises(UserError, match="method full"):
        AdapterCache(base, {"whole": whole}, 0)
    damaged = RunDirectory(tmp_path / "damaged")
    damaged.write_config(PersonalizeConfig(base=base.name), [{}])
    damaged.save_checkpoint({"step": 1, "model": {"unet/x": torch.zeros(1)}, "ema": {}}, keep=1)
    cache = AdapterCache(base, {"damaged": damaged, "cat": make_run(fresh_base(), tmp_path, "cat")}, 0)
    with pytest.raises(UserError, match="another base or method"):
        cache.use("damaged")
    cache.use("cat")
    assert not [name for name, _ in base.unet.named_parameters() if "damaged" in name]


def test_a_style_that_lacked_memory_can_be_had_later(fresh_base, tmp_path, monkeypatch):
    """What it got hold of is given back."""
    base = fresh_base()
    cache = AdapterCache(base, {"dog": make_run(fresh_base(), tmp_path, "dog")}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(tuned_module, "trained_parts", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            cache.use("dog")
    assert not [name for name, _ in base.unet.named_parameters() if "lora" in name]
    cache.use("dog")
    assert "dog" in cache


def raise_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_texts_and_pictures_are_drawn_as_personalize_draws_them(
    make_server, open_queue, start_worker, fresh_base, tmp_path
):
    base, tuned = fresh_base(), fresh_base()
    run = make_run(tuned, tmp_path, "dog")
    config = make_server(None, {"base": base.name, "styles": {"dog": str(run.path)}, "batch_size": 4})
    queue = open_queue(config)
    upload = keep_upload(queue, "B", JPEG)
    weaker = {"unet_scale": 0.5, "text_encoder_scale": 0.0}
    asked = {
        "0": TextRequest(prompt="a {token} {class}", style="dog", seed=5, **weaker, **FEW),
        "A": TextRequest(prompt="a {token} {class}", style="dog", n=2, seed=5, **FEW),
        "B": ImageRequest(prompt="a lawn", upload=upload, strength=0.7, seed=6, **FEW),
        "C": TextRequest(prompt="a lawn", seed=7, **FEW),
        "D": TextRequest(prompt="a {nothing}", seed=8, **FEW),
    }
    jobs = {user: queue.submit(user, request).job for user, request in asked.items()}
    start_worker(config, *open_drawers(config))
    assert queue.offer()["styles"] == ["dog"]
    wait_until(lambda: not queue.jobs_in(["queued", "running"]))
    drawn = {user: arrays(map(Image.open, queue.files(queue.job(job.id)))) for user, job in jobs.items()}
    sampling = Sampling(**FEW)
    np.testing.assert_array_equal(drawn["A"], arrays(draw(tuned, ["a sks dog"] * 2, [5, 6], sampling)))
    set_scales(tuned, 0.5, 0.0)
    np.testing.assert_array_equal(drawn["0"], arrays(draw(tuned, ["a sks dog"], [5], sampling)))
    assert np.abs(drawn["0"][0].astype(int) - drawn["A"][0]).max() > 0
    start = Image.open(config.uploads / upload)
    how = Sampling(**FEW, strength=0.7)
    np.testing.assert_array_equal(drawn["B"], arrays(draw(base, ["a lawn"], [6], how, start=start)))
    np.testing.assert_array_equal(drawn["C"], arrays(draw(base, ["a lawn"], [7], sampling)))
    assert (queue.job(jobs["D"].id).state, drawn["D"]) == ("failed", [])
    assert "{nothing}" in queue.job(jobs["D"].id).error


def test_progress_is_told_at_every_step(fresh_base):
    told: list[float] = []
    assert len(list(draw(fresh_base(), ["a dog"] * 2, [0, 1], Sampling(2, 3.0), on_step=told.append))) == 2
    assert told == sorted(told)
    assert (len(told) >= 4, told[-1]) == (True, 1.0)


def test_the_base_that_ships_is_the_default_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr("improved_diffusion.serving.config.SHIPPED_BASE", tmp_path / "base")
    assert ModelsConfig().text_base is None
    with pytest.raises(UserError, match="name it, models.base"):
        ModelsConfig(styles={"dog": "runs/dog"})
    (tmp_path / "base").mkdir()
    assert ModelsConfig().text_base == str(tmp_path / "base")
    assert (ModelsConfig(base="a/b").text_base, ModelsConfig(base=None).text_base) == ("a/b", None)
