from __future__ import annotations

import base64
import http.client
import io
import json
import random
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.studies.survey.form import Answers, Key, Shown, key_path, parse_answers, read_key
from improved_diffusion.personalize.studies.survey.report import summarise
from improved_diffusion.personalize.studies.survey.server import LARGEST, SurveyServer

PROMPTS = [f"a dog in place {number}" for number in range(6)]


def write_images(folder: Path, prompts: list[str], value: int = 0) -> Path:
    """A folder of images whose files tell, in every way that a file can, which system they are from."""
    folder.mkdir(parents=True)
    secret = f"made by {folder.name}"
    lines = []
    for number, prompt in enumerate(prompts):
        image = Image.new("RGB", (24, 16), (value, 40 * number, 99))
        if number % 2:
            name = f"{folder.name}_{number}.jpg"
            exif = image.getexif()
            exif[0x010E] = secret
            image.save(folder / name, comment=secret, exif=exif)
        else:
            name = f"{folder.name}_{number}.png"
            info = PngInfo()
            info.add_text("parameters", secret)
            image.save(folder / name, pnginfo=info)
        lines.append(json.dumps({"file_name": name, "text": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


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


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [write_images(tmp_path / "base", PROMPTS), write_images(tmp_path / "tuned", PROMPTS, 255)]


@pytest.fixture
def page(folders, tmp_path, run_script) -> Path:
    """Of two systems, eight images, with references."""
    out, references = tmp_path / "out" / "survey.html", write_images(tmp_path / "references", PROMPTS)
    outcome = run_script(
        "personalize.py", "survey", "page", *folders, "--out", out, "--references", references, "--n", 9
    )
    assert outcome.code == 0, outcome.err
    return out


def answers_as_sent(key: Key, name: str = "Ada", session: str = "0" * 16, value=lambda image, question: 3) -> dict:
    given = {image: {question: value(image, question) for question in key.questions} for image in key.images}
    return {"survey": key.survey, "name": name, "session": session, "answers": given}


# ----------------------------------------------------------------------------------------------------------------------
# The page


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


def test_texts_cannot_break_out_of_the_page(tmp_path, run_script):
    text = "</script><script>alert('1')</script> <!-- SURVEY_DATA \u2028 é"
    folder = write_images(tmp_path / "odd", [text])
    run_script("personalize.py", "survey", "page", folder, "--out", tmp_path / "s.html", "--title", text)
    survey = Page(tmp_path / "s.html").survey
    assert survey["title"] == text
    assert survey["images"][0]["prompt"] == " ".join(text.split())


def test_systems_of_one_name_go_by_their_paths(tmp_path, run_script):
    folders = [write_images(tmp_path / run / "samples", PROMPTS) for run in ("a", "b")]
    run_script("personalize.py", "survey", "page", *folders, "--out", tmp_path / "s.html")
    assert {shown.system for shown in read_key(tmp_path / "s.key.json").images.values()} == set(map(str, folders))


def test_says_that_prompts_may_tell_systems_apart(tmp_path, run_script):
    folders = [write_images(tmp_path / "a", PROMPTS[:3]), write_images(tmp_path / "b", PROMPTS[3:])]
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


# ----------------------------------------------------------------------------------------------------------------------
# Answers

KEY = Key("survey", ("sharpness", "prompt"), {name: Shown("base", f"{name}.png", name) for name in ("a", "b", "c")})


@pytest.mark.parametrize(
    "change",
    [
        {"survey": "another"},
        {"name": ""},
        {"name": "x" * 41},
        {"name": 5},
        {"session": "../../etc/passwd"},
        {"session": None},
        {"answers": {}},
        {"answers": []},
        {"answers": {"unknown": {"prompt": 1}}},
        {"answers": {"a": {"beauty": 1}}},
        {"answers": {"a": 3}},
        {"answers": {"a": {"prompt": 6}}},
        {"answers": {"a": {"prompt": -1}}},
        {"answers": {"a": {"prompt": 2.5}}},
        {"answers": {"a": {"prompt": True}}},
        {"answers": {"a": {"prompt": None}}},
        {"more": 1},
    ],
)
def test_nonsense_is_refused(change):
    with pytest.raises(UserError):
        parse_answers(json.dumps(answers_as_sent(KEY) | change).encode(), KEY)


@given(st.one_of(st.binary(), st.recursive(st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())))
def test_whatever_comes_is_refused_in_words(text):
    with pytest.raises(UserError):
        parse_answers(text, KEY)


def test_bottomless_json_is_refused():
    with pytest.raises(UserError):
        parse_answers(b"[" * 1_000_000, KEY)


@pytest.fixture
def survey_key(tmp_path) -> Path:
    KEY.write(tmp_path / "s.key.json")
    return tmp_path / "s.key.json"


def report_on(run_script, key: Path, *arguments: object):
    return run_script("personalize.py", "survey", "report", *arguments, "--key", key)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (json.dumps(answers_as_sent(KEY))[:-9], "is not JSON"),
        (json.dumps(answers_as_sent(KEY) | {"survey": "another"}), "answers another survey"),
        (json.dumps(answers_as_sent(KEY)), "are of the same person"),
        (None, "cannot read"),
    ],
)
def test_report_names_the_file_it_refuses(content, complaint, survey_key, tmp_path, run_script):
    good, bad = tmp_path / "answers-Ada.json", tmp_path / "answers-Bob.json"
    good.write_text(json.dumps(answers_as_sent(KEY)))
    if content is not None:
        bad.write_text(content)
    outcome = report_on(run_script, survey_key, good, bad)
    assert outcome.is_one_clear_line()
    assert complaint in outcome.err
    assert str(bad) in outcome.err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"survey": 1, "questions": [], "images": {"a": {}}}', None])
def test_report_refuses_what_is_no_key(content, tmp_path, run_script):
    if content is not None:
        (tmp_path / "k.json").write_text(content)
    outcome = report_on(run_script, tmp_path / "k.json", tmp_path)
    assert outcome.is_one_clear_line()
    assert "k.json" in outcome.err


def test_report_on_a_folder_without_answers(survey_key, tmp_path, run_script):
    outcome = report_on(run_script, survey_key, tmp_path)
    assert outcome.is_one_clear_line()
    assert "no answers" in outcome.err


# ----------------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture
def server(page, tmp_path):
    with SurveyServer(page, tmp_path / "answers", port=0) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def post(server: SurveyServer, content: bytes) -> int:
    address = f"http://127.0.0.1:{server.server_port}/answers"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, content), timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_server_serves_the_page_and_nothing_else(server, page):
    address = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(f"{address}/", timeout=10) as reply:
        assert reply.read() == page.read_bytes()
    for path in ("survey.key.json", "survey.html", "../out/survey.key.json", "answers"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{path}", timeout=10)


def test_server_keeps_what_many_send_at_once(server, tmp_path):
    names = ["Ada", *(f"Person {number}" for number in range(22)), "Ada"]
    sent = [answers_as_sent(server.key, name, f"{number:016x}") for number, name in enumerate(names)]
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda answers: post(server, json.dumps(answers).encode()), [*sent, *sent]))
    assert statuses == [200] * 48
    files = sorted((tmp_path / "answers").iterdir())
    kept = [json.loads(file.read_text()) for file in files]
    assert sorted(kept, key=lambda answers: answers["session"]) == sent
    assert files[0].name == f"answers-Ada-{0:016x}.json"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b"\xff", json.dumps(answers_as_sent(KEY)).encode()])
def test_server_refuses_nonsense(content, server, tmp_path):
    assert post(server, content) == 400
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(("length", "status"), [(str(LARGEST + 1), 413), ("much", 400), ("-1", 400), (None, 400)])
def test_server_refuses_by_length_before_it_reads(length, status, server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest("POST", "/answers")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_server_says_when_it_cannot_keep(server, tmp_path):
    (tmp_path / "answers").write_text("a file where the folder should be")
    assert post(server, json.dumps(answers_as_sent(server.key)).encode()) == 500


def test_serve_refuses(page, server, survey_key, tmp_path, run_script):
    shutil.copy(page, tmp_path / "s.html")  # beside the key of another survey
    for arguments, complaint in [
        ([tmp_path / "s.html"], "is the key of another survey"),
        ([tmp_path / "none.html"], "no key"),
        ([page, "--port", server.server_port], "cannot serve"),
        ([page, "--port", 70_000], "cannot serve"),
    ]:
        outcome = run_script("personalize.py", "survey", "serve", *arguments, "--answers", tmp_path / "answers")
        assert outcome.is_one_clear_line()
        assert complaint in outcome.err


# ----------------------------------------------------------------------------------------------------------------------
# The report


def people(key: Key, count: int, value) -> list[Answers]:
    """Answers `value(person, shown)` of `count` people to all questions."""
    return [
        Answers(
            key.survey,
            f"person {person}",
            f"{person:016x}",
            {image: dict.fromkeys(key.questions, value(person, shown)) for image, shown in key.images.items()},
        )
        for person in range(count)
    ]


def two_systems(same_prompts: bool) -> Key:
    prompts = {"base": range(30), "tuned": range(30) if same_prompts else range(30, 60)}
    shown = [Shown(system, f"{n}.png", f"prompt {n}") for system, numbers in prompts.items() for n in numbers]
    return Key("survey", ("sharpness",), {f"{number:016x}": image for number, image in enumerate(shown)})


def test_means_and_counts_with_missing_answers():
    ada = Answers("survey", "Ada", "0" * 16, {"a": {"sharpness": 5, "prompt": 1}, "b": {"sharpness": 2}})
    bob = Answers("survey", "Bob", "1" * 16, {"a": {"sharpness": 5}})
    sharpness, prompt = summarise([ada, bob], KEY).means
    assert (sharpness.mean, sharpness.images, sharpness.people) == (4.0, 2, 2)
    assert (prompt.mean, prompt.interval, prompt.images, prompt.people) == (1.0, None, 1, 1)


def test_a_question_that_nobody_answered():
    report = summarise([Answers("survey", "Ada", "0" * 16, {"a": {"sharpness": 5}})], two_systems(True))
    assert all(mean.mean is None and mean.interval is None for mean in report.means)
    assert report.differences[0].mean is None
    assert report.agreement == {"sharpness": None}


def test_differences_are_paired_by_prompt():
    """Prompts differ much and systems by one everywhere: pairs show it, and images of other prompts do not."""
    drawn = random.Random(0)
    ease = {f"prompt {n}": drawn.choice([0, 0, 4, 4]) for n in range(60)}
    ease |= {f"prompt {n + 30}": ease[f"prompt {n}"] for n in range(30)}

    def value(person: int, shown: Shown) -> int:
        return ease[shown.prompt] + (shown.system == "tuned" and (person + len(shown.file)) % 4 > 0)

    paired, unpaired = (summarise(people(key, 4, value), key).differences[0] for key in map(two_systems, [True, False]))
    assert (paired.first, paired.second, paired.pairs, unpaired.pairs) == ("base", "tuned", 30, 0)
    assert paired.mean == unpaired.mean == -0.75
    width = [difference.interval[1] - difference.interval[0] for difference in (paired, unpaired)]
    assert width[0] < width[1] / 2
    assert paired.interval[1] < 0 < unpaired.interval[1]


def test_a_single_person(survey_key, tmp_path, run_script):
    (tmp_path / "answers-Ada.json").write_text(
        json.dumps(answers_as_sent(KEY, value=lambda image, question: "abc".index(image)))
    )
    outcome = report_on(run_script, survey_key, tmp_path)
    assert outcome.out.splitlines()[-3:-1] == ["sharpness  -", "prompt     -"]
    assert "note: one person answered" in outcome.out


def test_from_the_page_to_the_report(server, page, tmp_path, run_script):
    """Five people answer at the server; "tuned" is one point better in style for all but one of them."""
    key = server.key
    for person in range(5):

        def value(image: str, question: str, person: int = person) -> int:
            better = question == "style" and key.images[image].system == "tuned" and person != 2
            return 2 + int(image, 16) % 2 + better

        assert (
            post(server, json.dumps(answers_as_sent(key, f"Person {person}", f"{person:016x}", value)).encode()) == 200
        )
    outcome = report_on(
        run_script, key_path(page), tmp_path / "answers", "--json", tmp_path / "r.json", "--plot", tmp_path / "p.png"
    )
    assert outcome.code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["means"]) == 8
    assert all(mean["images"] == 4 and mean["people"] == 5 for mean in report["means"])
    means = {(mean["system"], mean["question"]): mean["mean"] for mean in report["means"]}
    assert means["tuned", "style"] == pytest.approx(means["tuned", "sharpness"] + 0.8)
    assert means["base", "style"] == means["base", "sharpness"]
    assert report["agreement"]["sharpness"] == 1.0
    assert report["agreement"]["style"] < 1.0
    row = next(line for line in outcome.out.splitlines() if line.startswith("tuned") and "style" in line)
    assert f"{means['tuned', 'style']:.2f}" in row
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG"
