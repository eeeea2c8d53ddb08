from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.data.containers import Folder
from improved_diffusion.data.image_set import content_sha256
from improved_diffusion.data.sums import array_sha256
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.opening import open_image, open_source
from improved_diffusion.metrics.images.sources import ArraySource, Source

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)


def all_images(source: Source, batch_size: int = 3) -> np.ndarray:
    batches = list(source.batches(batch_size))
    assert all(batch.images.dtype == np.uint8 and len(batch.images) <= batch_size for batch in batches)
    indices = np.concatenate([batch.indices for batch in batches])
    assert sorted({*indices, *source.broken}) == list(range(len(source)))
    assert (np.diff(indices) > 0).all()
    return np.concatenate([batch.images for batch in batches])


def write_folder(path: Path, images: np.ndarray = IMAGES) -> Path:
    for i, image in enumerate(images):
        file = path / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


def in_name_order(images: np.ndarray = IMAGES) -> np.ndarray:
    return np.concatenate([images[::2], images[1::2]])


def write_packed_set(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    labels = np.zeros(len(images), dtype=np.int64)
    np.save(path / "images.npy", images)
    np.save(path / "labels.npy", labels)
    sums = {"images_sha256": array_sha256(images), "labels_sha256": array_sha256(labels)}
    description = {"format_version": 1, "class_names": ["only"], "split": "all", **sums}
    description["content_sha256"] = content_sha256(*sums.values(), ("only",))
    (path / "dataset.json").write_text(json.dumps(description))
    return path


def zip_of(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for image in sorted(folder.rglob("*.*")):
            archive.write(image, image.relative_to(folder.parent))
    return file


def test_a_folder(tmp_path):
    source = open_source(write_folder(tmp_path / "images"))
    (tmp_path / "images" / "class0" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert len(source) == 7
    np.testing.assert_array_equal(all_images(source), in_name_order())


def test_a_zip_has_the_content_of_its_folder(tmp_path):
    folder = write_folder(tmp_path / "images")
    source = open_source(zip_of(folder, tmp_path / "images.zip"))
    np.testing.assert_array_equal(all_images(source), in_name_order())
    assert source.content_hash == open_source(folder).content_hash


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.savez(tmp_path / "b.npz", IMAGES)
    np.savez_compressed(tmp_path / "c.npz", images=IMAGES, labels=np.arange(7))
    sources = [open_source(tmp_path / name) for name in ("a.npy", "b.npz", "c.npz")]
    for source in sources:
        assert len(source) == 7
        np.testing.assert_array_equal(all_images(source), IMAGES)
    assert len({source.content_hash for source in sources}) == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_packed_set(tmp_path, channels):
    images = np.concatenate([IMAGES, IMAGES], axis=-1)[..., :channels]
    source = open_source(write_packed_set(tmp_path / "packed", images))
    np.testing.assert_array_equal(all_images(source), images)
    assert open_image(source, 3).shape == (10, 12, 3)


@pytest.mark.parametrize("images", [IMAGES, np.asfortranarray(IMAGES)], ids=["C", "Fortran"])
def test_an_npz_that_is_not_compressed_is_not_read_into_memory(tmp_path, images):
    np.savez(tmp_path / "a.npz", labels=np.arange(7), arr_0=images)
    source = open_source(tmp_path / "a.npz")
    assert isinstance(source.images, np.memmap)
    np.testing.assert_array_equal(source.images, IMAGES)
    assert source.labels.tolist() == list(range(7))


def test_a_flipped_bit_in_an_npz_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(IMAGES.tobytes()) + 100] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        open_source(tmp_path / "a.npz")


def test_the_content_hash_is_of_pixels_and_their_order_and_not_of_names(tmp_path):
    folder = write_folder(tmp_path / "images")
    before = open_source(folder).content_hash
    (folder / "class0" / "0.png").rename(folder / "class0" / "00.png")
    assert open_source(folder).content_hash == before
    (folder / "class0" / "00.png").rename(folder / "class1" / "9.png")
    assert open_source(folder).content_hash != before
    (folder / "class1" / "9.png").rename(folder / "class0" / "0.png")
    Image.fromarray(IMAGES[0] ^ 1).save(folder / "class0" / "0.png")
    assert open_source(folder).content_hash != before
    changed = IMAGES.copy()
    changed[3, 2, 1, 0] ^= 1
    assert ArraySource("x", changed).content_hash != ArraySource("x", IMAGES).content_hash
    assert ArraySource("x", IMAGES.reshape(7, 12, 10, 3)).content_hash != ArraySource("x", IMAGES).content_hash


def test_images_of_several_kinds_and_sizes(tmp_path):
    Image.new("L", (4, 4), 100).save(tmp_path / "a-grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b-clear.webp", lossless=True)
    Image.new("P", (8, 2)).save(tmp_path / "c-palette.bmp")
    Image.new("RGB", (8, 2), (10, 20, 30)).save(tmp_path / "d-photo.JPEG", quality=100)
    batches = [batch.images for batch in open_source(tmp_path).batches(64)]
    assert [batch.shape for batch in batches] == [(2, 4, 4, 3), (2, 2, 8, 3)]
    assert (batches[0][0] == 100).all()
    assert (batches[0][1] == 255).all()  # a clear image lies on white
    assert abs(batches[1][1].astype(int) - [10, 20, 30]).max() <= 2


def test_many_images_stay_in_order(tmp_path):
    grey = np.repeat(np.arange(200, dtype=np.uint8), 12).reshape(200, 2, 2, 3)
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"{i:03}.png")
    np.testing.assert_array_equal(all_images(open_source(tmp_path), 33), grey)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_broken_images_are_left_out_and_noted(tmp_path, packed):
    folder = write_folder(tmp_path / "images")
    damaged = folder / "class1" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (folder / "class1" / "1.png").write_bytes(b"")
    source = open_source(zip_of(folder, tmp_path / "images.zip") if packed else folder)
    assert len(source.content_hash) == 64
    np.testing.assert_array_equal(all_images(source), in_name_order()[[0, 1, 2, 3, 6]])
    assert set(source.broken) == {4, 5}
    assert "class1/3.png" in source.broken[5]


def test_a_part_of_a_source_and_one_image(tmp_path):
    for source in (ArraySource("x", in_name_order()), open_source(write_folder(tmp_path / "images"))):
        batches = list(source.batches(2, 1, 6))
        assert np.concatenate([batch.indices for batch in batches]).tolist() == [1, 2, 3, 4, 5]
        np.testing.assert_array_equal(np.concatenate([batch.images for batch in batches]), in_name_order()[1:6])
        np.testing.assert_array_equal(open_image(source, 4), in_name_order()[4])


def test_a_subset(tmp_path):
    folder = write_folder(tmp_path / "images")
    whole = ArraySource("x", in_name_order(), np.array([0, 0, 0, 0, 1, 1, 1]), ("class0", "class1"))
    for source in (whole, open_source(folder), open_source(zip_of(folder, tmp_path / "images.zip"))):
        subset = source.subset(np.array([1, 3, 4]))
        np.testing.assert_array_equal(all_images(subset), in_name_order()[[1, 3, 4]])
        assert subset.labels.tolist() == [0, 0, 1]
        assert subset.class_names == ("class0", "class1")
        assert subset.content_hash != source.content_hash
        np.testing.assert_array_equal(all_images(subset.subset(np.array([0, 2]))), in_name_order()[[1, 4]])


def test_classes_are_those_of_the_folders_the_set_or_the_file(tmp_path):
    folder = write_folder(tmp_path / "images")
    for source in (open_source(folder), open_source(zip_of(folder, tmp_path / "images.zip"))):
        assert source.class_names == ("class0", "class1")
        assert source.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    Image.fromarray(IMAGES[0]).save(folder / "no-class.png")
    assert open_source(folder).labels is None
    assert open_source(folder / "class0").labels is None
    np.savez(tmp_path / "labelled.npz", arr_0=IMAGES, labels=np.arange(7))
    assert open_source(tmp_path / "labelled.npz").labels.tolist() == list(range(7))
    np.savez(tmp_path / "wrong.npz", arr_0=IMAGES, labels=np.arange(6))
    with pytest.raises(UserError, match="labels of shape"):
        open_source(tmp_path / "wrong.npz")
    assert open_source(write_packed_set(tmp_path / "packed", IMAGES[:, :, :10])).class_names == ("only",)


def test_a_damaged_member_of_a_zip_is_a_broken_image(tmp_path):
    file = zip_of(write_folder(tmp_path / "images"), tmp_path / "images.zip")
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    file.write_bytes(content)
    source = open_source(file)
    all_images(source)
    assert "class0/0.png" in source.broken[0]


def test_what_is_no_set_of_images_is_said_in_one_line(tmp_path):
    def saved(name: str, **arrays: np.ndarray) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "one", IMAGES[:1])
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY damaged")
    (tmp_path / "bad.npz").write_bytes(b"PK damaged")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "bad.zip").write_bytes((tmp_path / "texts.zip").read_bytes()[:-10])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "dataset.json").write_text("{}")
    cases = [
        (tmp_path / "missing", "nothing at"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "one", "1 image"),
        (tmp_path / "text.txt", "no set of images"),
        (tmp_path / "texts.zip", "no images"),
        (tmp_path / "bad.zip", "no set of images"),
        (tmp_path / "bad.npy", "damaged"),
        (tmp_path / "bad.npz", "damaged"),
        (tmp_path / "run", "run directory"),
        (tmp_path / "half", "packed set"),
        (saved("floats.npz", images=IMAGES / 255), "float64"),
        (saved("nchw.npz", images=IMAGES.transpose(0, 3, 1, 2)), r"\(7, 3, 10, 12\)"),
        (saved("labels.npz", labels=np.arange(3)), "found labels"),
        (saved("one.npz", images=IMAGES[:1]), "1 image"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message) as error:
            open_source(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


def test_what_could_not_be_read_this_once_is_not_taken_for_broken(tmp_path, monkeypatch):
    source = open_source(write_folder(tmp_path / "images"))
    read = Folder.read

    def read_or_fail(self, name):
        if name.endswith("2.png"):
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(Folder, "read", read_or_fail)
    with pytest.raises(UserError, match=r"cannot read class0/2.png of .*Input/output error"):
        all_images(source)
    assert not source.broken
