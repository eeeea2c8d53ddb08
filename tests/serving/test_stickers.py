"""Stickers as a kind of job: those of stickers.py, of photos that were sent."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.serving import drawers
from improved_diffusion.serving.config import LimitsConfig, ModelsConfig
from improved_diffusion.serving.database import packs
from improved_diffusion.serving.drawers import open_drawers
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.requests import StickerRequest
from improved_diffusion.serving.uploads import keep_upload
from improved_diffusion.serving.words import describe
from improved_diffusion.stickers.finish import require_sticker
from tests.personalize.conftest import tiny_judges  # noqa: F401
from tests.serving.conftest import OFFER, wait_until
from tests.serving.test_text_drawer import make_run
from tests.serving.test_uploads import disc, encoded
from tests.stickers.conftest import cutout, keep_colours  # noqa: F401

EVERYTHING = {**OFFER, "kinds": [*OFFER["kinds"], "sticker"], "captions": True}
CUTS = {**OFFER, "kinds": ["class", "sticker"]}


def test_stickers_are_those_of_the_sticker_maker(
    make_server,
    open_queue,
    start_worker,
    fresh_base,
    tiny_judges,  # noqa: F811
    cutout,  # noqa: F811
    keep_colours,  # noqa: F811
    run_script,
    tmp_path,
):
    """With a caption, in a style, and only cut out; to the byte."""
    base, blip = fresh_base(), str(tiny_judges["blip"])
    run = make_run(base, tmp_path, "dog").path
    models = {"base": base.name, "styles": {"dog": str(run)}, "matting": str(cutout), "captioner": blip}
    config = make_server(None, models)
    queue = open_queue(config)
    upload = keep_upload(queue, "A", disc())
    how = {"upload": upload, "steps": 2, "seed": 5, "outline": 6}
    asked = {
        "captioned": StickerRequest(style="dog", **how),
        "prompted": StickerRequest(style="dog", prompt="a {token} on a {class}", strength=1.0, **how),
        "cut": StickerRequest(restyle=False, prompt="is not looked at", **how),
    }
    opened, offer = open_drawers(config)
    assert (offer["kinds"], offer["captions"]) == (["text", "image", "tune", "sticker"], True)
    start_worker(config, opened, offer)
    jobs = {name: queue.submit("A", request).job for name, request in asked.items()}
    wait_until(lambda: not queue.jobs_in(["queued", "running"]))
    drawn = {}
    for name, job in jobs.items():
        (file,) = queue.files(queue.job(job.id))
        require_sticker(file)
        assert file.suffix == ".webp"
        drawn[name] = file.read_bytes()
    assert len(set(drawn.values())) == 3
    sent, out, matting, outline = config.uploads / upload, tmp_path / "out", f"--matting={cutout}", "--outline=6"
    how_made = (f"--run={run}", f"--blip={blip}", "--steps=2", "--seed=5")
    for command in (
        ("make", sent, *how_made, matting, outline, f"--out={out / 'captioned'}"),
        ("cut", sent, matting, f"--out={out / 'alone'}"),
        ("finish", out / f"alone/{upload}.png", outline, f"--out={out / 'cut/stickers'}"),
    ):
        outcome = run_script("stickers.py", *command)
        assert outcome.code == 0, outcome.err
    for name in ("captioned", "cut"):
        assert drawn[name] == (out / name / "stickers" / f"{upload}.webp").read_bytes(), name


def test_without_a_base_photos_are_cut_out(make_server, open_queue, start_worker, cutout, keep_colours):  # noqa: F811
    config = make_server(None, {"matting": str(cutout)})
    queue = open_queue(config)
    opened, offer = open_drawers(config)
    assert (offer["kinds"], offer["captions"]) == (["sticker"], False)
    start_worker(config, opened, offer)
    photos = disc(), encoded(Image.new("RGB", (64, 64), "white"))
    jobs = [queue.submit("A", StickerRequest(upload=keep_upload(queue, "A", photo))).job for photo in photos]
    wait_until(lambda: not queue.jobs_in(["queued", "running"]))
    made, failed = (queue.job(job.id) for job in jobs)
    with Image.open(*queue.files(made)) as sticker:
        assert (sticker.mode, max(sticker.size), sticker.getchannel("A").getextrema()) == ("RGBA", 512, (0, 255))
        red, green, _, _ = sticker.getpixel((sticker.width // 2, sticker.height // 2))
        assert red > green + 50, "it is the photo's disc"
    assert (failed.state, "nothing stands out" in failed.error) == ("failed", True)


def test_stickers_are_offered_where_something_cuts_them_out(tiny_run, make_server, monkeypatch, tmp_path):
    monkeypatch.setattr(drawers, "SHIPPED", tmp_path / "not there")
    assert "sticker" not in open_drawers(make_server(tiny_run, {"matting": "pretrained"}))[1]["kinds"]
    with pytest.raises(UserError, match="there is no cut-out at"):
        open_drawers(make_server(tiny_run, {"matting": str(tmp_path / "neither")}))
    with pytest.raises(UserError, match="not alpha"):
        ModelsConfig(matting="alpha")


def test_the_cut_out_is_on_the_device_of_the_settings(make_server, cutout):  # noqa: F811
    with pytest.raises(UserError, match="cuda:99 cannot be used here"):
        open_drawers(make_server(None, {"matting": str(cutout), "device": "cuda:99"}))


@pytest.mark.parametrize(
    ("values", "offer", "problem"),
    [
        ({}, OFFER, "no sticker jobs"),
        ({"n": 2}, EVERYTHING, "one sticker at a time"),
        ({"outline": 65}, EVERYTHING, "0 to 64 pixels"),
        ({"style": "cat"}, EVERYTHING, "no style 'cat'"),
        ({"strength": 0.0}, EVERYTHING, "strength must be above 0"),
        ({"prompt": "a fox" * 200}, EVERYTHING, "at most 500 letters"),
        ({"prompt": "a {caption}"}, {**EVERYTHING, "captions": False}, "nobody here says what it shows"),
        ({"prompt": "a fox"}, CUTS, "only cuts out"),
    ],
)
def test_what_cannot_be_had_is_refused_before_it_is_queued(values, offer, problem):
    with pytest.raises(UserError, match=problem):
        StickerRequest(upload="x", **values).check(LimitsConfig(), offer)


def test_only_what_is_drawn_anew_needs_what_that_needs():
    """A style is no obstacle where the photo is only cut out, and that takes no longer for many steps."""
    wish = StickerRequest(upload="x", style="gone")
    for offer in (CUTS, {**EVERYTHING, "captions": False}):
        wish.check(LimitsConfig(), offer)
    StickerRequest(upload="x", prompt="a {caption}").check(LimitsConfig(), EVERYTHING)
    assert StickerRequest(upload="x", restyle=False, steps=100).work == 1
    assert describe(StickerRequest(upload="x", prompt="a fox")) == "a sticker: a fox"


def test_a_home_of_an_older_version_gets_what_it_lacks(make_server, open_queue):
    config = make_server()
    queue = open_queue(config)
    with queue.engine.begin() as connection:
        packs.drop(connection)
    assert "serving_packs" not in sa.inspect(queue.engine).get_table_names()
    again = JobQueue(config)
    assert again.purge("A") == 0
    again.close()
