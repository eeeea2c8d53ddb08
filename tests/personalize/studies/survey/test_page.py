"""The survey's page: what it shows, what it keeps to itself, and its own program."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.personalize.studies.survey.form import key_path, parse_answers, read_key


class Page(HTMLParser):
    """The scripts of a page by their id, and the addresses that its tags refer to."""

    def __init__(self, path: Path):
        super().__init__()
        self.scripts: dict[str | None, str] = {}
        self.addresses: list[str] = []
        self.inside: str | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.survey = json.loads(self.scripts["survey"])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        if tag == "script":
            self.inside = attributes.get("id")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.lasttag = ""


def test_page_shows_systems_evenly_with_the_same_prompts(page):
    survey, key = Page(page).survey, read_key(key_path(page))
    assert [image["id"] for image in survey["images"]] == list(key.images)
    assert [question["id"] for question in survey["questions"]] == list(key.questions)
    assert Counter(shown.system for shown in key.images.values()) == {"base": 4, "tuned": 4}
    prompts = {s: {i.prompt for i in key.images.values() if i.system == s} for s in ("base", "tuned")}
    assert prompts["base"] == prompts["tuned"]
    assert len(prompts["base"]) == 4
    for image in survey["images"]:
        shown = key.images[image["id"]]
        assert image["prompt"] == shown.prompt
        with Image.open(page.parents[1] / shown.system / shown.file) as file, decoded(image["image"]) as embedded:
            difference = np.asarray(file.convert("RGB"), float) - np.asarray(embedded, float)
        assert np.abs(difference).max() < 6


def decoded(data_uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_uri.split(",")[1])))


def test_page_is_blind(page):
    """Neither its source nor its images tell a system or a file."""
    content = page.read_bytes()
    for image in Page(page).survey["images"]:
        content += base64.b64decode(image["image"].split(",")[1])
    for secret in (b"tuned", b"base_", b"made by", b".png", b".jpg"):
        assert secret not in content


def test_page_needs_nothing_from_outside(page):
    parsed = Page(page)
    assert parsed.addresses == []
    assert "http:" not in page.read_text()
    assert "https:" not in page.read_text()
    assert len(parsed.survey["references"]["style"]) == 4


def test_page_is_reproducible_and_another_seed_is_another_survey(folders, tmp_path, run_script):
    pages = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_script("personalize.py", "survey", "page", *folders, "--out", tmp_path / name, "--n", 6, "--seed", seed)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert Page(tmp_path / "a").survey["id"] != Page(tmp_path / "c").survey["id"]


def test_without_references_style_is_not_asked(folders, tmp_path, run_script):
    outcome = run_script("personalize.py", "survey", "page", folders[0], "--out", tmp_path / "s.html")
    assert "asks for sharpness, prompt, artifacts\n" in outcome.out
    assert read_key(tmp_path / "s.key.json").questions == ("sharpness", "prompt", "artifacts")


def test_texts_cannot_break_out_of_the_page(write_images, tmp_path, run_script):
    text = "</script><script>alert('1')</script> <!-- SURVEY_DATA \u2028 é"
    folder = write_images(tmp_path / "odd", [text])
    run_script("personalize.py", "survey", "page", folder, "--out", tmp_path / "s.html", "--title", text)
    survey = Page(tmp_path / "s.html").survey
    assert survey["title"] == text
    assert survey["images"][0]["prompt"] == " ".join(text.split())


def test_systems_of_one_name_go_by_their_paths(write_images, tmp_path, run_script):
    folders = [write_images(tmp_path / run / "samples") for run in ("a", "b")]
    run_script("personalize.py", "survey", "page", *folders, "--out", tmp_path / "s.html")
    assert {shown.system for shown in read_key(tmp_path / "s.key.json").images.values()} == set(map(str, folders))


def test_says_that_prompts_may_tell_systems_apart(write_images, tmp_path, run_script):
    folders = [write_images(tmp_path / name, [f"a dog {name}"]) for name in ("here", "there")]
    outcome = run_script("personalize.py", "survey", "page", *folders, "--out", tmp_path / "s.html")
    assert "note: the systems share no prompt" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["base", "base"], "twice"),
        (["base", "tuned", "--n", "1"], "1 images are too few for 2 systems"),
        (["base", "--seed", "-1"], "--seed"),
        (["nowhere"], "nowhere"),
        (["uncaptioned"], "caption"),
        (["base", "--references", "nowhere"], "nowhere"),
    ],
)
def test_page_refuses(arguments, complaint, folders, tmp_path, run_script, monkeypatch):
    (tmp_path / "uncaptioned").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "uncaptioned" / "a.png")
    monkeypatch.chdir(tmp_path)
    outcome = run_script("personalize.py", "survey", "page", *arguments, "--out", "s.html")
    assert outcome.is_one_clear_line()
    assert complaint in outcome.err
    assert not (tmp_path / "s.html").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The page's own program


def run_logic(page: Path, program: str) -> object:
    """What `program` leaves in `result`, run after the page's logic with its `survey` at hand."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    parsed = Page(page)
    source = f"{parsed.scripts['logic']}\nconst survey = {parsed.scripts['survey']};\nlet result;\n{program}\n"
    ended = subprocess.run(
        [node, "-"], input=source + "console.log(JSON.stringify(result));", capture_output=True, text=True, check=True
    )
    return json.loads(ended.stdout)


def test_each_person_has_an_order_of_their_own(page):
    program = "result = [...Array(800).keys()].map(n => orderFor(`person ${n}`, survey).map(image => image.id));"
    orders, again = run_logic(page, program), run_logic(page, program)
    assert orders == again
    ids = sorted(read_key(key_path(page)).images)
    assert all(sorted(order) == ids for order in orders)
    places = Counter((image, place) for order in orders for place, image in enumerate(order))
    assert len(places) == 64
    assert all(60 < count < 140 for count in places.values())  # 100 each, four standard deviations about it


def test_the_page_writes_answers_that_can_be_read(page):
    program = """
      const state = beginning(survey, "Zoë / 李", "0123456789abcdef"), order = orderFor(state.name, survey);
      const open = () => firstOpen(state, order, survey.questions);
      const places = [open()];
      order.forEach((image, place) => survey.questions.forEach(question => answer(state, image, question, place % 6)));
      places.push(open());
      delete state.answers[order[2].id].prompt;
      places.push(open());
      result = { places, file: answersFile(state), third: order[2].id };
    """
    result = run_logic(page, program)
    key = read_key(key_path(page))
    answers = parse_answers(result["file"]["text"].encode(), key)
    assert result["places"] == [0, len(key.images), 2]
    assert result["file"]["name"] == answers.file_name == "answers-Zoë_李-0123456789abcdef.json"
    assert answers.answers[result["third"]] == {"sharpness": 2, "style": 2, "artifacts": 2}
