"""The report on a survey: its statistics, and what it refuses."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from improved_diffusion.personalize.studies.survey.form import Answers, Key, Shown, key_path
from improved_diffusion.personalize.studies.survey.report import summarise


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


def test_means_and_counts_with_missing_answers(small_key):
    ada = Answers("survey", "Ada", "0" * 16, {"a": {"sharpness": 5, "prompt": 1}, "b": {"sharpness": 2}})
    bob = Answers("survey", "Bob", "1" * 16, {"a": {"sharpness": 5}})
    sharpness, prompt = summarise([ada, bob], small_key).means
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


def test_a_single_person(small_key, small_key_file, answers_as_sent, report_on, tmp_path):
    (tmp_path / "answers-Ada.json").write_text(
        json.dumps(answers_as_sent(small_key, value=lambda image, question: "abc".index(image)))
    )
    outcome = report_on(small_key_file, tmp_path)
    assert outcome.out.splitlines()[-3:-1] == ["sharpness  -", "prompt     -"]
    assert "note: one person answered" in outcome.out


def test_from_the_page_to_the_report(server, page, answers_as_sent, post, report_on, tmp_path):
    """Five people answer at the server; "tuned" is one point better in style for all but one of them."""
    key = server.key
    for person in range(5):

        def value(image: str, question: str, person: int = person) -> int:
            better = question == "style" and key.images[image].system == "tuned" and person != 2
            return 2 + int(image, 16) % 2 + better

        answers = answers_as_sent(key, f"Person {person}", f"{person:016x}", value)
        assert post(json.dumps(answers).encode()) == 200
    outcome = report_on(
        key_path(page), tmp_path / "answers", "--json", tmp_path / "r.json", "--plot", tmp_path / "p.png"
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


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda sent: json.dumps(sent)[:-9], "is not JSON"),
        (lambda sent: json.dumps(sent | {"survey": "another"}), "answers another survey"),
        (json.dumps, "are of the same person"),
        (None, "cannot read"),
    ],
    ids=["half", "another", "twice", "missing"],
)
def test_report_names_the_file_it_refuses(
    content, complaint, small_key, small_key_file, answers_as_sent, report_on, tmp_path
):
    good, bad = tmp_path / "answers-Ada.json", tmp_path / "answers-Bob.json"
    sent = answers_as_sent(small_key)
    good.write_text(json.dumps(sent))
    if content is not None:
        bad.write_text(content(sent))
    outcome = report_on(small_key_file, good, bad)
    assert outcome.is_one_clear_line()
    assert complaint in outcome.err
    assert str(bad) in outcome.err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"survey": 1, "questions": [], "images": {"a": {}}}', None])
def test_report_refuses_what_is_no_key(content, report_on, tmp_path):
    if content is not None:
        (tmp_path / "k.json").write_text(content)
    outcome = report_on(tmp_path / "k.json", tmp_path)
    assert outcome.is_one_clear_line()
    assert "k.json" in outcome.err


def test_report_on_a_folder_without_answers(small_key_file, report_on, tmp_path):
    outcome = report_on(small_key_file, tmp_path)
    assert outcome.is_one_clear_line()
    assert "no answers" in outcome.err
