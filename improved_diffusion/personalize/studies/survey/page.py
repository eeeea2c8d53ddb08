"""The page of a survey: images of one or several systems, drawn evenly and shown blind, in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.files import write_text
from improved_diffusion.personalize.data.captioned import CaptionedImage, CaptionedSet, open_captioned_set
from improved_diffusion.personalize.studies.survey.form import (
    LONGEST_NAME,
    MOST,
    QUESTIONS,
    STYLE,
    Key,
    Shown,
    key_path,
)

TEMPLATE = Path(__file__).with_name("page.html")
LONGER_SIDE = 1024  # pixels of an image on the page at most, to bound the page's size
REFERENCES = 4
REFERENCE_SIDE = 512


def open_systems(folders: Sequence[Path]) -> dict[str, CaptionedSet]:
    """The images of each system, under the folder's name, or under its path where names repeat.

    Raises:
        UserError: a folder twice, one without usable images, or an image without a prompt.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same folder is given twice: give one folder for each system")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return {name: open_captioned_set(path, captions_required=True) for name, path in zip(names, folders, strict=True)}


def make_survey(
    systems: dict[str, CaptionedSet], out: Path, references: CaptionedSet | None, n: int, seed: int, title: str
) -> Key:
    """Write the page to `out`, and beside it the key that tells where its images came from.

    The same arguments make the same survey.

    Args:
        systems: each with its images and their prompts.
        out: an HTML file.
        references: images in the style that was trained; without them that question is not asked.
        n: images in all at most, the same number of each system.
        seed: of which images are drawn.
        title: the page's heading.

    Raises:
        UserError: `n` is less than one image for each system, or a file cannot be written.
    """
    rng = np.random.default_rng(seed)
    drawn = draw_evenly(list(systems.values()), n, rng)
    pairs = [(system, image) for system, images in zip(systems, drawn, strict=True) for image in images]
    entries, shown = [], {}
    for place in rng.permutation(len(pairs)):
        system, image = pairs[place]
        entry = {"prompt": image.caption, "image": _data_uri(image, LONGER_SIDE)}
        # A hash of what the page shows anyway tells nothing more of where it came from.
        name = _hash(seed, len(entries), entry)
        entries.append({"id": name, **entry})
        shown[name] = Shown(system, image.name, image.caption)
    examples = []
    if references:
        chosen = rng.permutation(len(references))[:REFERENCES]
        examples = [_data_uri(references.images[number], REFERENCE_SIDE) for number in chosen]
    questions = [question for question in QUESTIONS if examples or question is not STYLE]
    asked = tuple(question.id for question in questions)
    key = Key(_hash(list(shown), asked), asked, shown)
    survey = {
        "id": key.survey,
        "title": title,
        "most": MOST,
        "longestName": LONGEST_NAME,
        "questions": [asdict(question) for question in questions],
        "references": {STYLE.id: examples},
        "images": entries,
    }
    data = json.dumps(survey).replace("<", "\\u003c")  # a prompt with </script> would end the page's data
    write_text(out, TEMPLATE.read_text(encoding="utf-8").replace("SURVEY_DATA", data, 1))
    key.write(key_path(out))
    return key


def draw_evenly(sets: Sequence[CaptionedSet], n: int, rng: np.random.Generator) -> list[list[CaptionedImage]]:
    """As many images of each set, at most `n` in all: of as many prompts as can be, the same ones of each set first.

    Raises:
        UserError: `n` is less than one image for each set.
    """
    each = min(n // len(sets), *(len(images) for images in sets))
    if each < 1:
        raise UserError(f"{n} images are too few for {len(sets)} systems: raise --n")
    prompts = [{image.caption for image in images.images} for images in sets]
    shared, every = set.intersection(*prompts), sorted(set.union(*prompts))
    rank = dict(zip(every, rng.permutation(len(every)), strict=True))
    drawn = []
    for images in sets:
        turns: Counter[str] = Counter()  # one image of every prompt comes before a second one of any
        ordered = []
        for number in rng.permutation(len(images)):
            image = images.images[number]
            ordered.append((turns[image.caption], image.caption not in shared, rank[image.caption], image))
            turns[image.caption] += 1
        ordered.sort(key=lambda item: item[:3])
        drawn.append([image for *_, image in ordered[:each]])
    return drawn


def _data_uri(image: CaptionedImage, longer_side: int) -> str:
    """The pixels alone: comments and other metadata of the file could tell which system made it."""
    pixels = Image.fromarray(np.asarray(image.load()))
    pixels.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=95, subsampling=0)  # alike for all, whatever the files are
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _hash(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
