"""The page in a real browser, with a worker that draws for real; where there is no Chromium, this is skipped."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from improved_diffusion.serving.commands.init import make_home
from improved_diffusion.serving.config import LimitsConfig, ModelsConfig, ServingConfig
from improved_diffusion.serving.drawers import open_drawers
from improved_diffusion.serving.queue import UNFINISHED, JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.requests import (
    ClassRequest,
    ImageRequest,
    ProcessRequest,
    StickerRequest,
    TextRequest,
    TuneRequest,
)
from improved_diffusion.serving.sticker_drawer import StickerDrawer
from improved_diffusion.serving.worker import Worker
from improved_diffusion.stickers.finish import require_sticker
from tests.conftest import free_port
from tests.serving.conftest import wait_until
from tests.serving.test_uploads import JPEG, disc
from tests.stickers.conftest import darkness, keep_colours  # noqa: F401

PROJECT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=30_000)  # the machine may be busy
OFFER = {"kinds": ["class", "process", "text", "image", "tune"], "styles": ["dog", "ink"]}  # beside the pixel model's


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: one of {', '.join(BROWSERS)} would do (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Served:
    """A page, and who stands behind it."""

    address: str
    config: ServingConfig
    queue: JobQueue


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory, tiny_run) -> Iterator[Served]:
    port = free_port()
    config = ServingConfig(
        home=str(tmp_path_factory.mktemp("page") / "home"),
        page_port=port,
        survey="http://127.0.0.1:1/",
        models=ModelsConfig(pixel=str(tiny_run), base=None, matting=None, device="cpu"),
        limits=LimitsConfig(steps=20, upload_bytes=3_000_000),
    )
    make_home(config)
    queue = JobQueue(config)
    Records(config, queue.engine).publish(open_drawers(config)[1] | OFFER)
    command = [sys.executable, str(PROJECT / "serve.py"), "page", "--home", config.home]
    page = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: page.poll() is None and answers(f"{address}/_stcore/health"))
        yield Served(address, config, queue)
        page.terminate()
        assert page.wait(20) == 0
    finally:
        page.kill()
        queue.close()


@pytest.fixture
def worker(served) -> Iterator[None]:
    """Draws while the test lasts."""
    drawers, offer = open_drawers(served.config)
    at_work = Worker(served.config, drawers, offer | OFFER)
    at_work.start()
    yield
    at_work.stop()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address).status == 200
    except OSError:
        return False


def visit(browser: Browser, address: str, form: str) -> Page:
    page = browser.new_context().new_page()
    page.goto(address)
    page.get_by_role("tab", name=form).click()
    return page


def press_draw(page: Page) -> None:
    page.get_by_test_id("stFormSubmitButton").locator("visible=true").get_by_role("button").click()


def user_of(page: Page) -> str:
    return f"page:{re.search('visitor=([A-Za-z0-9_-]{22})', page.url)[1]}"


def pictures(page: Page):
    return page.get_by_test_id("stImage").locator("img")


def test_two_visitors(served, browser, worker):
    """Each sees the own pictures, also after a reload, and can fetch them as they are on disk."""
    one, other = (visit(browser, served.address, "A class") for _ in range(2))
    press_draw(one)
    press_draw(other)
    expect(pictures(one)).to_have_count(4)
    expect(pictures(other)).to_have_count(4)
    assert user_of(one) != user_of(other)
    (job,) = served.queue.jobs_of(user_of(one))
    assert isinstance(job.request, ClassRequest)
    one.reload()
    expect(pictures(one)).to_have_count(4)
    with one.expect_download() as download:
        one.get_by_role("button", name="Download").nth(1).click()
    assert Path(download.value.path()).read_bytes() == served.queue.files(job)[1].read_bytes()
    other.get_by_role("button", name="Remove all").click()
    expect(pictures(other)).to_have_count(0)
    assert served.queue.jobs_of(user_of(other)) == []
    assert len(served.queue.jobs_of(user_of(one))) == 1


def test_how_an_image_comes_about(served, browser, worker):
    """The pictures of the way end in the image that is drawn without them."""
    page = visit(browser, served.address, "A class")
    page.get_by_label("Seed").locator("visible=true").fill("5")
    press_draw(page)
    expect(pictures(page)).to_have_count(4)
    page.get_by_text("Show how it comes about").click()
    press_draw(page)
    expect(pictures(page)).to_have_count(6)
    expect(page.get_by_text("Moment")).to_have_count(1)
    plain, process = served.queue.jobs_of(user_of(page))
    assert isinstance(process.request, ProcessRequest)
    way = [Image.open(file) for file in served.queue.files(process)]
    assert len(way) == plain.request.steps
    assert way[-1].tobytes() == Image.open(served.queue.files(plain)[0]).tobytes() != way[0].tobytes()


def test_what_is_asked_for_waits_and_is_cancelled(served, browser):
    """Without a worker: a text in a style, then with a photo; what is no photo is refused."""
    page = visit(browser, served.address, "From a text or a photo")
    page.get_by_label("Prompt").fill("a *dog* in the snow")
    page.get_by_label("What it should not show").fill("rain")
    press_draw(page)
    expect(page.get_by_text("Place 1 in the queue").first).to_be_visible()
    expect(page.get_by_text("a *dog* in the snow (4 pictures)")).to_be_visible()
    files = page.get_by_test_id("stFileUploaderDropzoneInput").first
    files.set_input_files({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"})
    page.get_by_text("photo.jpg").wait_for()
    press_draw(page)
    expect(page.get_by_text("this is no picture that can be read here")).to_be_visible()
    files.set_input_files({"name": "better.jpg", "mimeType": "image/jpeg", "buffer": JPEG})
    page.get_by_text("better.jpg").wait_for()
    press_draw(page)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(2)
    text, image = served.queue.jobs_of(user_of(page))
    values = {"prompt": "a *dog* in the snow", "n": 4, "steps": 20, "negative_prompt": "rain", "style": "dog"}
    assert text.request == TextRequest(seed=text.request.seed, **values)
    assert image.request == ImageRequest(seed=image.request.seed, upload=image.request.upload, **values)
    assert (served.config.uploads / image.request.upload).is_file()
    page.get_by_role("button", name="Cancel").first.click()
    expect(page.get_by_role("button", name="Cancel")).to_have_count(1)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled")).to_have_count(2)
    assert served.queue.jobs_of(user_of(page), UNFINISHED) == []
    assert page.get_by_role("link", name="survey").get_attribute("href") == served.config.survey


def test_a_style_of_ones_own(served, browser):
    """From pictures; when it is learned it can be chosen, until it is removed."""
    page = visit(browser, served.address, "A style of my own")
    page.get_by_label("Name of the style").fill("rex")
    page.get_by_label("What the pictures show").fill("dog")
    files = page.get_by_test_id("stFileUploaderDropzoneInput").last
    pictures_of_rex = [{"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": JPEG + bytes(n)} for n in range(2)]
    files.set_input_files(pictures_of_rex)
    page.get_by_text("1.jpg").wait_for()
    press_draw(page)
    expect(page.get_by_text("style rex, dog, from 2 pictures")).to_be_visible()
    (job,) = served.queue.jobs_of(user_of(page))
    uploads = job.request.uploads
    assert job.request == TuneRequest(name="rex", class_name="dog", uploads=uploads, steps=TuneRequest.steps)
    records = Records(served.config, served.queue.engine)
    records.finish(*records.begin([job.id]), [Image.new("RGB", (8, 8))])
    expect(pictures(page)).to_have_count(1)
    page.get_by_role("tab", name="From a text or a photo").click()
    page.get_by_role("combobox", name="Style").click()
    expect(page.get_by_role("option")).to_have_text(["dog", "ink", "rex", "none"])
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove this style").click()
    expect(pictures(page)).to_have_count(0)
    assert served.queue.jobs_of(user_of(page)) == []


@pytest.fixture
def sticker_maker(served, keep_colours) -> Iterator[None]:  # noqa: F811
    """A worker that cuts out what is dark, and no more."""
    before = served.queue.offer()
    offer = {"kinds": ["sticker"], "classes": [], "styles": []}
    at_work = Worker(served.config, {"sticker": StickerDrawer(served.config, darkness, None, None)}, offer)
    at_work.start()
    yield
    at_work.stop()
    Records(served.config, served.queue.engine).publish(before)


def test_a_photo_becomes_a_sticker(served, browser, sticker_maker, tmp_path):
    page = visit(browser, served.address, "A sticker")
    press_draw(page)
    expect(page.get_by_text("Choose a photo first")).to_be_visible()
    files = page.get_by_test_id("stFileUploaderDropzoneInput")
    files.set_input_files({"name": "disc.jpg", "mimeType": "image/jpeg", "buffer": disc()})
    page.get_by_text("disc.jpg").wait_for()
    press_draw(page)
    expect(pictures(page)).to_have_count(1)
    expect(page.get_by_text("outline 10", exact=True)).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    (sticker,) = tmp_path.glob("*.webp")
    require_sticker(sticker)
    (job,) = served.queue.jobs_of(user_of(page))
    assert sticker.read_bytes() == served.queue.files(job)[0].read_bytes()
    shown = page.request.get(pictures(page).get_attribute("src")).body()
    assert Image.open(io.BytesIO(shown)).getchannel("A").getextrema() == (0, 255), "it is shown as it is"
    offer = {**served.queue.offer(), "kinds": ["image", "sticker"], "styles": ["dog"], "captions": True}
    Records(served.config, served.queue.engine).publish(offer)
    page.reload()
    files.set_input_files({"name": "disc.jpg", "mimeType": "image/jpeg", "buffer": disc()})
    page.get_by_text("disc.jpg").wait_for()
    page.get_by_label("What to make of it").fill("a fox")
    press_draw(page)
    expect(page.get_by_text("a sticker: a fox")).to_be_visible()
    asked = served.queue.jobs_of(user_of(page))[-1].request
    values = {"prompt": "a fox", "style": "dog", "steps": 20, "upload": job.request.upload}
    assert asked == StickerRequest(seed=asked.seed, **values)


def test_an_address_that_is_taken(served, run_script):
    outcome = run_script("serve.py", "page", "--home", served.config.home)
    assert outcome.is_one_clear_line()
    assert "choose another with --port" in outcome.err
