from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.data.captioned import open_captioned_set


def photo(width: int = 40, height: int = 20) -> Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two good images, one of them with a caption, and five things that trip other tools up."""
    photo().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa red  and\nblue flag\n", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    photo().save(tmp_path / "deep" / "b.jpg", quality=95)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "deep" / "b.jpg").read_bytes()[:300])
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    return tmp_path


def test_a_folder_with_captions_beside_the_images(folder):
    found = open_captioned_set(folder)
    assert [(image.name, image.caption) for image in found.images] == [
        ("a.png", "a red and blue flag"),
        ("deep/b.jpg", None),
    ]
    assert len(found.skipped) == 2
    assert any(line.startswith("paper.pdf: not an image") for line in found.skipped)
    assert any(line.startswith("broken.jpg: ") for line in found.skipped)
    assert found.without_caption() == ["deep/b.jpg"]
    with pytest.raises(UserError, match=r"1 of 2 images .* deep/b\.jpg: write deep/b\.txt"):
        open_captioned_set(folder, captions_required=True)


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    photo().save(tmp_path / "phone.png", exif=exif)
    image = open_captioned_set(tmp_path).images[0].load()
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == (255, 0, 0)
    assert image.getpixel((10, 35)) == (0, 0, 255)


def test_stickers_lie_on_the_colour_that_was_chosen(tmp_path):
    sticker = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    sticker.putpixel((0, 0), (10, 20, 30, 255))
    sticker.save(tmp_path / "sticker.png")
    image = open_captioned_set(tmp_path).images[0].load("#00ff00")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert image.getpixel((4, 4)) == (0, 255, 0)
    with pytest.raises(UserError, match="'greem' is no colour"):
        open_captioned_set(tmp_path, background="greem")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(folder, kind):
    rows = [("a.png", 'a flag, "red" and blue'), ("deep/b.jpg", "drapeau rouge é"), ("gone.png", "nothing")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in rows)
    else:
        quoted = [f'{name},"{caption.replace(chr(34), chr(34) * 2)}"' for name, caption in rows]
        text = "\n".join(["file_name,text", *quoted])
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8")
    found = open_captioned_set(folder, captions_required=True)
    assert [image.caption for image in found.images] == ['a flag, "red" and blue', "drapeau rouge é"]
    assert "gone.png: listed in the metadata, but not there" in found.skipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png"', "cannot read .*metadata.jsonl"),
        ('{"name": "a.png", "text": "x"}', "entry 1: there is no file_name"),
        ('{"file_name": "a.png", "title": "x"}', r"entry 1 \(a.png\): there is no text in 'text'"),
    ],
)
def test_damaged_metadata_names_the_entry(folder, content, message):
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        open_captioned_set(folder)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("as_struct", [True, False])
def test_a_parquet_file_as_the_hub_has_it(tmp_path, as_struct):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [png(photo()), b"no image", png(photo(10, 10))]
    images = [{"bytes": cell, "path": None} for cell in cells] if as_struct else cells
    table = {"image": images, "en_text": ["a flag", "broken", None], "zh_text": ["旗", "坏", "方"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    for path in (tmp_path, tmp_path / "train.parquet"):
        found = open_captioned_set(path)
        assert [(image.name, image.caption) for image in found.images] == [
            ("train.parquet[0]", "a flag"),
            ("train.parquet[2]", None),
        ]
        assert found.images[1].load().size == (10, 10)
        assert len(found.skipped) == 1
    assert open_captioned_set(tmp_path, caption_column="zh_text").images[0].caption == "旗"
    message = r"1 of 2 images .* have no caption, the first is train\.parquet\[2\]: fill in the caption of its row"
    with pytest.raises(UserError, match=message):
        open_captioned_set(tmp_path, captions_required=True)
    with pytest.raises(UserError, match="no column of captions: looked for de_text, found image, en_text, zh_text"):
        open_captioned_set(tmp_path, caption_column="de_text")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match="damaged or no parquet"):
        open_captioned_set(tmp_path)


def test_a_parquet_file_of_images_alone(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    photo().save(buffer, format="png")
    parquet.write_table(pyarrow.table({"image": [buffer.getvalue()]}), tmp_path / "a.parquet")
    (image,) = open_captioned_set(tmp_path).images
    assert (image.caption, image.size) == (None, (40, 20))
    with pytest.raises(UserError, match="has no column of captions"):
        open_captioned_set(tmp_path, captions_required=True)


def test_a_column_of_captions_where_there_are_no_columns(folder):
    with pytest.raises(UserError, match="no metadata.jsonl or metadata.csv with a column 'en': leave out images.capt"):
        open_captioned_set(folder, caption_column="en")


def test_what_people_give_in_place_of_a_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "flags.zip", "w") as archive:
        archive.write(folder / "a.png")
    with pytest.raises(UserError, match=r"flags.zip: it is a zip archive: unpack it, and give the folder"):
        open_captioned_set(tmp_path / "flags.zip")
    with pytest.raises(UserError, match=r"a.png: it is a single picture: give the folder that holds it"):
        open_captioned_set(folder / "a.png")


def test_photographs_of_telephones(tmp_path):
    pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "IMG_0001.HEIC", format="HEIF", exif=exif.tobytes(), quality=95)
    (found,) = open_captioned_set(tmp_path).images
    image = found.load()
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == pytest.approx((255, 0, 0), abs=20)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match="no folder or parquet file"):
        open_captioned_set(tmp_path / "missing")
    with pytest.raises(UserError, match="no usable images"):
        open_captioned_set(tmp_path)
    (tmp_path / "film.png").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    with pytest.raises(UserError, match=r"no usable images .* film\.png"):
        open_captioned_set(tmp_path)
