"""What the page, the server and the report of a survey share: its questions, its key, and a person's answers."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.files import write_text

MOST = 5  # answers are whole numbers from 0 to this; more is better in every question
LONGEST_NAME = 40
SESSION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Question:
    """What is asked of every image, and what the ends of the scale mean."""

    id: str
    text: str
    least: str  # what 0 means
    most: str


STYLE = Question("style", "How well does it match the style of the examples?", "another style", "the same style")
QUESTIONS = (
    Question("sharpness", "How sharp is the picture?", "blurred", "sharp"),
    Question("prompt", "How well does it show what the text says?", "not at all", "exactly"),
    STYLE,
    Question("artifacts", "How free is it of faults, such as broken shapes or smears?", "full of faults", "clean"),
)


@dataclass(frozen=True)
class Shown:
    """Where an image of a survey came from, which its page does not tell."""

    system: str
    file: str
    prompt: str


@dataclass(frozen=True)
class Key:
    """What one needs beside the answers to read them."""

    survey: str
    questions: tuple[str, ...]
    images: dict[str, Shown]  # by the id that the page and the answers call it by

    def write(self, path: Path) -> None:
        """Raises UserError where that fails."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def key_path(page: Path) -> Path:
    """Where the key of `page` lies: survey.key.json beside survey.html."""
    return page.with_suffix(".key.json")


def read_key(path: Path) -> Key:
    """The key that `Key.write` wrote.

    Raises:
        UserError: no such file, or it is no key.
    """
    try:
        stored = json.loads(path.read_bytes())
        images = {name: Shown(**shown) for name, shown in stored["images"].items()}
        return Key(stored["survey"], tuple(stored["questions"]), images)
    except FileNotFoundError:
        raise UserError(f"no key at {path}: personalize.py survey page writes it beside the page") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no key of a survey, or damaged ({type(error).__name__})") from error


@dataclass(frozen=True)
class Answers:
    """What one person said. A question that was left out of `answers` was not answered."""

    survey: str
    name: str
    session: str  # random, made when the person began: of two people with one name, each has an own one
    answers: dict[str, dict[str, int]]  # image id -> question id -> 0 to MOST

    @property
    def file_name(self) -> str:
        readable = re.sub(r"\W+", "_", self.name)
        return f"answers-{readable}-{self.session}.json"


def parse_answers(text: bytes, key: Key) -> Answers:
    """The answers in `text`, JSON as the page writes it.

    Raises:
        UserError: it is no such thing, or belongs to another survey; the message begins in the middle of a sentence,
            for the caller knows where the text came from.
    """
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("is not JSON") from error
    if not isinstance(stored, dict) or stored.keys() != {"survey", "name", "session", "answers"}:
        raise UserError("holds no answers to a survey")
    if stored["survey"] != key.survey:
        raise UserError("answers another survey")
    name, session, answers = stored["name"], stored["session"], stored["answers"]
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME:
        raise UserError(f"has no name of 1 to {LONGEST_NAME} letters")
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise UserError("has no session of 16 hexadecimal digits")
    if not isinstance(answers, dict) or not answers:
        raise UserError("holds no answers")
    for image, given in answers.items():
        if image not in key.images:
            raise UserError(f"is about an image that the survey does not have ({image[:20]!r})")
        if not isinstance(given, dict) or not given.keys() <= set(key.questions):
            raise UserError(f"answers questions of image {image} that the survey does not ask")
        if not all(type(value) is int and 0 <= value <= MOST for value in given.values()):
            raise UserError(f"has an answer about image {image} that is no whole number from 0 to {MOST}")
    return Answers(key.survey, name, session, answers)


def read_answers(paths: Sequence[Path], key: Key) -> list[Answers]:
    """The answers of every person in `paths`, each a file, or a folder of files answers-*.json.

    Raises:
        UserError: no answers there, a file that `parse_answers` refuses, or the same person's in two files.
    """
    found: dict[str, tuple[Path, Answers]] = {}
    for path in itertools.chain.from_iterable(map(_files, paths)):
        try:
            answers = parse_answers(path.read_bytes(), key)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{path} {error}") from error
        if answers.session in found:
            raise UserError(f"{found[answers.session][0]} and {path} are of the same person: leave one out")
        found[answers.session] = path, answers
    return [answers for _, answers in found.values()]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("answers-*.json"))
    if not files:
        raise UserError(f"there are no answers (answers-*.json) in {path}")
    return files
