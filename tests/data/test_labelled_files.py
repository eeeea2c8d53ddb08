"""What counts as an image, a class and a split in folders, zips and torchvision's Food101."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.data.containers import Folder
from improved_diffusion.data.labelled_files import LabelledFiles, labelled_folder, labelled_food101, with_validation
from improved_diffusion.errors import UserError

ODD_NAMES = ["crème brûlée", "寿司", 'it\'s "it"', "a & b; $(c)", "ends with space ", "#1 100%", "ZEBRA", "new\nline"]


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


@pytest.fixture(params=["folder", "zip"])
def make(request: pytest.FixtureRequest, tmp_path: Path):
    """Both kinds of container must read the same names the same way."""
    if request.param == "folder":
        return lambda *names: make_files(tmp_path / "set", *names)
    return lambda *names: make_zip(tmp_path / "set.zip", *names)


def test_class_folders(make):
    found = labelled_folder(make("b/2.png", "a/1.JPG", "b/1.jpeg"))
    assert found.class_names == ("a", "b")
    assert found.splits == {"all": [("a/1.JPG", 0), ("b/1.jpeg", 1), ("b/2.png", 1)]}
    assert found.container.read("b/2.png") == b"b/2.png"


def test_splits_share_one_class_list(make):
    found = labelled_folder(make("val/c/1.png", "train/b/1.png", "test/a/1.png", "train/c/1.png"))
    assert found.class_names == ("a", "b", "c")
    assert list(found.splits) == ["train", "val", "test"]
    assert found.splits["train"] == [("train/b/1.png", 1), ("train/c/1.png", 2)]
    assert found.splits["test"] == [("test/a/1.png", 0)]


def test_odd_class_names_survive(make):
    found = labelled_folder(make(*(f"{name}/{name}.png" for name in ODD_NAMES)))
    assert found.class_names == tuple(sorted(ODD_NAMES))
    for name, label in found.splits["all"]:
        assert name == f"{found.class_names[label]}/{found.class_names[label]}.png"
        assert found.container.read(name) == name.encode()


def test_undecodable_folder_name_survives(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9")
    try:
        found = labelled_folder(make_files(tmp_path, f"{name}/1.png"))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert found.class_names == (name,)
    assert found.container.read(f"{name}/1.png") == b"caf\xe9/1.png"


def test_zip_names_without_the_utf8_flag(tmp_path: Path):
    """UTF-8 stored unflagged, as macOS does, is read as UTF-8; bytes that are not UTF-8 as code page 437."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("crXXme/1.png", "content")
        archive.writestr("cafX/1.png", "")
    raw = path.read_bytes().replace(b"crXXme", "crème".encode()).replace(b"cafX", "café".encode("cp437"))
    path.write_bytes(raw)
    found = labelled_folder(path)
    assert found.class_names == ("café", "crème")
    assert found.container.read("crème/1.png") == b"content"


def test_zip_names_with_backslashes(tmp_path: Path):
    found = labelled_folder(make_zip(tmp_path / "set.zip", "a\\1.png", "b\\", "b\\1.png"))
    assert found.class_names == ("a", "b")
    assert found.container.read("b/1.png") == b"b\\1.png"


def test_zip_names_that_are_no_utf8_although_they_say_so(tmp_path: Path):
    path = make_zip(tmp_path / "set.zip", "é/1.png")  # which is flagged as UTF-8
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match="cannot read"):
        labelled_folder(path)


def test_links_in_a_circle_end(tmp_path: Path):
    root = make_files(tmp_path / "set", "a/1.png", "b/2.png")
    make_files(tmp_path / "elsewhere", "3.png")
    for link, target in {"a/self": "a", "a/up": "..", "a/other": "b", "b/other": "a", "b/more": "elsewhere"}.items():
        (root / link).symlink_to({"..": root, "elsewhere": tmp_path / "elsewhere"}.get(target, root / target))
    found = [name for name, _ in labelled_folder(root).splits["all"]]
    assert found == ["a/1.png", "a/other/2.png", "a/other/more/3.png", "b/2.png", "b/more/3.png", "b/other/1.png"]


def test_hidden_and_system_files_are_skipped(make):
    found = labelled_folder(
        make("a/1.png", "a/.hidden.png", ".git/x.png", "__MACOSX/a/1.png", "a/Thumbs.db", "a/.DS_Store", "b/1.png")
    )
    assert found.splits == {"all": [("a/1.png", 0), ("b/1.png", 1)]}
    assert found.notes == ()


def test_stray_files_and_empty_folders_are_noted(make):
    found = labelled_folder(make("a/1.png", "a/notes.txt", "a/2.txt", "README", "a/photo.raw"))
    assert found.splits == {"all": [("a/1.png", 0)]}
    (note,) = found.notes
    assert note == "skipped 4 files that are no images: 2 .txt, 1 no extension, 1 .raw"


def test_folder_without_images_is_no_class(tmp_path: Path):
    make_files(tmp_path, "a/1.png", "b/readme.txt")
    (tmp_path / "c").mkdir()
    found = labelled_folder(tmp_path)
    assert found.class_names == ("a",)
    assert found.notes[1] == "skipped 2 folders without images: 'b', 'c'"


def test_deeper_folders_belong_to_their_class(make):
    found = labelled_folder(make("a/x/1.png", "a/x/y/2.png", "a/3.png", "b/1.png"))
    assert found.class_names == ("a", "b")
    assert [label for _, label in found.splits["all"]] == [0, 0, 0, 1]


def test_wrapping_folder_is_looked_through(make):
    found = labelled_folder(make("my set/train/a/1.png", "my set/test/b/1.png"))
    assert found.class_names == ("a", "b")
    assert found.splits == {"train": [("my set/train/a/1.png", 0)], "test": [("my set/test/b/1.png", 1)]}


def test_single_class(make):
    assert labelled_folder(make("a/1.png", "a/2.png")).class_names == ("a",)


def test_single_split(make):
    found = labelled_folder(make("train/a/1.png"))
    assert (found.class_names, list(found.splits)) == (("a",), ["train"])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["2.png", "1.png"], {"all": [("1.png", 0), ("2.png", 0)]}),
        (["train/1.png", "val/2.png"], {"train": [("train/1.png", 0)], "val": [("val/2.png", 0)]}),
    ],
)
def test_images_in_no_class_folder_are_of_one_class(make, names, splits):
    found = labelled_folder(make(*names))
    assert (found.class_names, found.splits) == (("unlabelled",), splits)
    assert "--model.class_conditional false" in found.notes[-1]


def test_class_called_train_beside_other_classes(make):
    assert labelled_folder(make("bus/1.png", "train/1.png")).class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "a/2.png"], "'1.png' is not in a class folder; expected CLASS/IMAGE"),
        (["train/1.png", "test/a/2.png"], "'train/1.png' is not in a class folder"),
        (["train/a/1.png", "extra/b/1.png"], r"split folders \(train\) beside others \('extra', ...\)"),
        (["a/1.txt"], "no images in"),
    ],
)
def test_wrong_layout(make, names: list[str], message: str):
    with pytest.raises(UserError, match=message):
        labelled_folder(make(*names))


def test_neither_folder_nor_archive(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        labelled_folder(tmp_path / "x.tar")
    with pytest.raises(UserError, match="there is no folder or zip archive at"):
        labelled_folder(tmp_path / "missing")


def test_archive_can_go_to_another_process(tmp_path: Path):
    found = labelled_folder(make_zip(tmp_path / "set.zip", "a/1.png"))
    assert pickle.loads(pickle.dumps(found.container)).read("a/1.png") == b"a/1.png"


# ----------------------------------------------------------------------------------------------------------------------


def make_food101(root: Path) -> Path:
    """A tiny root as torchvision lays it out; the JSON order is not the label order, and names are not sorted."""
    meta = root / "food-101" / "meta"
    meta.mkdir(parents=True)
    splits = {
        "train": {"waffles": ["waffles/9", "waffles/10"], "apple_pie": ["apple_pie/1"]},
        "test": {"waffles": ["waffles/3"], "apple_pie": ["apple_pie/2"]},
    }
    for split, images in splits.items():
        (meta / f"{split}.json").write_text(json.dumps(images))
        make_files(root / "food-101" / "images", *(f"{name}.jpg" for names in images.values() for name in names))
    return root


@pytest.mark.parametrize("inside", [False, True])
def test_food101_from_an_existing_root(tmp_path: Path, inside: bool):
    root = make_food101(tmp_path / "torch data")
    found = labelled_food101(root / "food-101" if inside else root, download=False)
    assert found.class_names == ("apple_pie", "waffles")
    assert found.splits == {
        "train": [("apple_pie/1.jpg", 0), ("waffles/10.jpg", 1), ("waffles/9.jpg", 1)],
        "test": [("apple_pie/2.jpg", 0), ("waffles/3.jpg", 1)],
    }
    assert found.container.read("waffles/9.jpg") == b"waffles/9.jpg"


def test_food101_missing_or_damaged(tmp_path: Path):
    with pytest.raises(UserError, match="no usable food-101/"):
        labelled_food101(tmp_path / "nowhere", download=False)
    root = make_food101(tmp_path)
    (root / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(UserError, match=r"meta/test\.json"):
        labelled_food101(root, download=False)


def made_up_files(splits: dict[str, dict[str, int]]) -> LabelledFiles:
    """{"train/": {class: number of images}}, where "all" is no folder; there are no files."""
    class_names = tuple(sorted({name for classes in splits.values() for name in classes}))
    items = {
        split.rstrip("/"): [
            (f"{'' if split == 'all' else split}{name}/{i}.png", class_names.index(name))
            for name, count in classes.items()
            for i in range(count)
        ]
        for split, classes in splits.items()
    }
    return LabelledFiles("made up", Folder(Path("nowhere")), class_names, items)


class TestValidation:
    """A validation split that is taken out of the training images."""

    @given(
        counts=st.lists(st.integers(1, 130), min_size=1, max_size=3),
        per_class=st.integers(0, 30),
        split=st.sampled_from(["train/", ""]),
    )
    def test_sizes(self, counts: list[int], per_class: int, split: str):
        files = made_up_files({split or "all": {f"c{k}": count for k, count in enumerate(counts)}})
        carved = with_validation(files, per_class)
        (items,) = files.splits.values()
        parts = [carved.splits.get(name, []) for name in ("train", "val")]
        expected = [min(per_class, count // 5) for count in counts]
        assert np.bincount([label for _, label in parts[1]], minlength=len(counts)).tolist() == expected
        if any(expected):
            assert sorted(parts[0] + parts[1]) == sorted(items)
            assert list(carved.splits) == ["train", "val"]
            assert parts[0] == sorted(parts[0], key=items.index)
        else:
            assert carved.splits == files.splits

    def test_names_decide_and_new_images_change_little(self):
        def taken(**classes: int) -> set[str]:
            files = made_up_files({"train/": classes, "test/": {"a": 3}})
            return {name for name, _ in with_validation(files, 20).splits["val"]}

        few, more = taken(a=200), taken(a=205, b=100)
        assert len(few) == 20
        assert len(few & more) >= 17
        assert {name.split("/")[-1] for name in few} != {f"{i}.png" for i in range(20)}

    def test_a_split_of_ones_own_is_kept(self):
        files = made_up_files({"train/": {"a": 100}, "val/": {"a": 3}})
        assert with_validation(files, 20) == files
        assert with_validation(made_up_files({"test/": {"a": 100}}), 20).splits.keys() == {"test"}
