"""What a restyled picture is drawn from: a template with the photograph's caption, and a run's token and class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import SubjectConfig
from improved_diffusion.stickers.photos import Photo

CAPTION = "{caption}"
TEMPLATE = "a telegram sticker of {caption}"
TUNED = "a {token} {class} of {caption}"


def default_template(subject: SubjectConfig) -> str:
    """With the subject's token and class, where a run has them."""
    return TUNED if subject.token and subject.class_name else TEMPLATE


def fill(template: str, caption: str | None, subject: SubjectConfig) -> str:
    """The prompt of one picture.

    Raises:
        UserError: the template asks for something that is not there.
    """
    if CAPTION in template and not caption:
        raise UserError("it has no caption: run stickers.py caption, or give a --prompt without {caption}")
    escaped = (caption or "").replace("{", "{{").replace("}", "}}")  # it is text, whatever braces it has
    return subject.fill(template.replace(CAPTION, escaped))


def read_captions(photos: Sequence[Photo], folder: Path | None = None) -> dict[str, str]:
    """{name: text} of NAME.txt in `folder`, or else beside each photograph, where there is one."""
    files = {photo.name: (folder or photo.path.parent) / f"{photo.name}.txt" for photo in photos}
    return {name: file.read_text("utf-8", "replace").strip() for name, file in files.items() if file.is_file()}
