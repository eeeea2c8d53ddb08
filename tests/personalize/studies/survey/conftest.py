from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from improved_diffusion.personalize.studies.survey.form import Key, Shown
from improved_diffusion.personalize.studies.survey.server import SurveyServer

PROMPTS = [f"a dog in place {number}" for number in range(6)]


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Write a folder of images whose files tell, in every way that a file can, which system they are from."""

    def write(folder: Path, prompts: list[str] = PROMPTS, value: int = 0) -> Path:
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

    return write


@pytest.fixture
def folders(write_images, tmp_path) -> list[Path]:
    return [write_images(tmp_path / "base"), write_images(tmp_path / "tuned", value=255)]


@pytest.fixture
def page(folders, write_images, tmp_path, run_script) -> Path:
    """Of two systems, eight images, with references."""
    out, references = tmp_path / "out" / "survey.html", write_images(tmp_path / "references")
    outcome = run_script(
        "personalize.py", "survey", "page", *folders, "--out", out, "--references", references, "--n", 9
    )
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="session")
def small_key() -> Key:
    """Of a survey of three images."""
    images = {name: Shown("base", f"{name}.png", name) for name in ("a", "b", "c")}
    return Key("survey", ("sharpness", "prompt"), images)


@pytest.fixture
def small_key_file(small_key, tmp_path) -> Path:
    small_key.write(tmp_path / "s.key.json")
    return tmp_path / "s.key.json"


@pytest.fixture(scope="session")
def answers_as_sent() -> Callable[..., dict[str, Any]]:
    """All the answers of one person, as the page sends them."""

    def answer(key: Key, name: str = "Ada", session: str = "0" * 16, value=lambda image, question: 3) -> dict[str, Any]:
        given = {image: {question: value(image, question) for question in key.questions} for image in key.images}
        return {"survey": key.survey, "name": name, "session": session, "answers": given}

    return answer


@pytest.fixture
def report_on(run_script):
    return lambda key, *arguments: run_script("personalize.py", "survey", "report", *arguments, "--key", key)


@pytest.fixture
def server(page, tmp_path) -> Iterator[SurveyServer]:
    with SurveyServer(page, tmp_path / "answers", port=0) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def post(server) -> Callable[[bytes], int]:
    """Send answers to the server; returns the status of its reply."""

    def send(content: bytes) -> int:
        address = f"http://127.0.0.1:{server.server_port}/answers"
        try:
            with urllib.request.urlopen(urllib.request.Request(address, content), timeout=10) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    return send
