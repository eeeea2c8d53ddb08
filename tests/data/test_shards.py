"""Streaming from shards draws a function of seed and step too, however it is divided and wherever it begins."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.data import ImageSet
from improved_diffusion.data.__main__ import main
from improved_diffusion.data.shard_stream import ShardStream
from improved_diffusion.data.shards import open_sharded_set, write_shards
from improved_diffusion.errors import UserError

CPU = torch.device("cpu")
COUNT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six shards of eight or nine images; the label is the row number, and the left half is darker than the right."""
    images = np.random.default_rng(0).integers(0, 128, (COUNT, 4, 4, 3), dtype=np.uint8)
    images[:, :, 2:] += 128
    place = tmp_path_factory.mktemp("shards")
    (place / "packed").mkdir()
    image_set = ImageSet(images, np.arange(COUNT), tuple(map(str, range(COUNT))), place / "packed", "train", "")
    write_shards(image_set, place / "shards", shard_bytes=images.nbytes // 6)
    return place / "shards"


def make_stream(folder: Path, batch_size: int = 8, lanes: int = 3, **share: int) -> ShardStream:
    return ShardStream(open_sharded_set(folder), batch_size, 5, flip=True, lanes=lanes, device=CPU, **share)


def take(stream: ShardStream, first: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = stream.batches(first)
    return [next(batches) for _ in range(steps)]


def assert_equal(some: list, others: list) -> None:
    for one, other in zip(some, others, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_shard_is_a_webdataset_of_equal_parts(folder):
    sharded = open_sharded_set(folder)
    assert len(sharded) == COUNT
    assert sorted(shard.count for shard in sharded.shards) == [8, 8, 8, 8, 9, 9]
    drawn = np.concatenate([sharded.read(number)[1] for number in range(6)])
    assert sorted(drawn) == list(range(COUNT))
    assert np.abs(np.diff(drawn)).max() > COUNT / 2  # shuffled


@pytest.mark.parametrize("step", [1, 6, 40])
def test_a_resumed_stream_draws_what_an_unbroken_one_would(folder, step):
    """In the middle of a shard, of an epoch, and after many."""
    unbroken = take(make_stream(folder), 0, step + 8)[step:]
    assert_equal(take(make_stream(folder), step, 8), unbroken)


@pytest.mark.parametrize(("world_size", "lanes"), [(2, 4), (4, 2), (4, 3), (8, 8)])
def test_the_processes_divide_one_batch(folder, world_size, lanes):
    whole = take(make_stream(folder, lanes=lanes), 3, 9)
    shares = [
        take(make_stream(folder, lanes=lanes, rank=rank, world_size=world_size), 3, 9) for rank in range(world_size)
    ]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
    assert_equal(together, whole)


def test_a_process_reads_only_the_lanes_of_its_share(folder, monkeypatch):
    stream = make_stream(folder, lanes=4, rank=1, world_size=2)
    turns, read = stream._turns, []
    monkeypatch.setattr(stream, "_turns", lambda lane: read.append(lane) or turns(lane))
    take(stream, 0, 1)
    assert read == [2, 3]


@pytest.mark.parametrize("lanes", [1, 5])
def test_all_images_are_drawn_equally_often_in_ever_new_orders(folder, lanes):
    batches = take(make_stream(folder, batch_size=10, lanes=lanes), 0, 30)  # six epochs
    labels = torch.cat([y for _, y in batches])
    counts = torch.bincount(labels, minlength=COUNT)
    assert counts.min() >= 5
    assert counts.max() <= 7
    assert not torch.equal(labels[:COUNT], labels[COUNT : 2 * COUNT])
    x = torch.cat([x for x, _ in batches])
    flipped = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 0.35 < flipped.float().mean() < 0.65
    assert flipped[labels == 7].float().std() > 0  # now and then


@pytest.fixture
def server(folder):
    """The shards behind a web server; `.broken` names files that it does not give."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        broken: set[str] = set()

        def do_GET(self) -> None:
            if self.path.strip("/") in self.broken:
                self.send_error(404)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.handler, server.url = Handler, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_http_gives_what_the_folder_does(folder, server):
    assert_equal(take(make_stream(server.url), 4, 9), take(make_stream(folder), 4, 9))


def test_a_shard_that_cannot_be_read_is_named(server, monkeypatch):
    monkeypatch.setattr("improved_diffusion.data.shards.SECONDS_BETWEEN_ATTEMPTS", 0.01)
    server.handler.broken = {"000002.tar"}
    with pytest.raises(UserError, match=f"cannot read {server.url}/000002.tar"):
        take(make_stream(server.url), 0, 9)


def test_damage_is_noticed(folder, tmp_path):
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        (tmp_path / shard["name"]).write_bytes((folder / shard["name"]).read_bytes())
    index["shards"][3]["sha256"] = "0" * 64
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="000003.tar does not match its SHA-256"):
        take(make_stream(tmp_path), 0, 9)
    nothing = [{**index, "shards": []}, {**index, "shards": [{**index["shards"][0], "count": "3"}]}]
    for content in ({}, *nothing):
        (tmp_path / "index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="no index of a sharded set"):
            open_sharded_set(tmp_path)


def test_a_colon_in_a_path_is_no_url(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c:1").mkdir()
    shutil.copytree(folder, "c:1/shards")
    assert_equal(take(make_stream(Path("c:1/shards")), 0, 2), take(make_stream(folder), 0, 2))


def test_what_is_missing_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[streaming\]'"):
        open_sharded_set(folder)


def test_an_unlabelled_folder_is_sharded_and_trained_on(tmp_path, monkeypatch, run_script, tiny_config_file):
    generator = np.random.default_rng(0)
    (tmp_path / "files").mkdir()
    for number in range(40):
        image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "files" / f"{number}.png")
    out = tmp_path / "shards"
    command = ["shard", str(tmp_path / "files"), "--out", str(out), "--image-size", "16", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["data", *command])
    main()
    assert sorted(path.name for path in out.iterdir()) == ["000000.tar", "index.json", "val"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    flags = ["--config", tiny_config_file, "--data", out, "--model.class_conditional=false", "--model.class_dropout=0"]
    flags.append("--sampling.steps=2")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run_script("train.py", *flags, "--out", unbroken).code == 0
    assert run_script("train.py", *flags, "--out", broken, "--training.steps=7").code == 0
    outcome = run_script("train.py", "--resume", broken, "--training.steps=12")
    assert outcome.code == 0, outcome.err
    models = [torch.load(run / "checkpoints" / "step_0000012.pt")["model"] for run in (unbroken, broken)]
    assert all(map(torch.equal, *(model.values() for model in models)))


def test_a_packed_set_is_not_packed_in_another_way(tiny_set, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    monkeypatch.setattr(sys, "argv", ["data", "shard", str(tiny_set), "--out", str(out), "--image-size", "16"])
    with pytest.raises(UserError, match="packed already, and is divided as it is: leave out --image-size"):
        main()
    assert not out.exists()


def test_fid_of_a_set_that_is_far_away_needs_a_reference(server, run_script, tiny_config_file, tmp_path):
    flags = ["--config", tiny_config_file, "--data", server.url, "--evaluation.features=64", "--model.image_size=4"]
    flags += ["--model.channel_multipliers=[1]", "--model.attention_resolutions=[]", "--model.class_conditional=false"]
    outcome = run_script("train.py", *flags, "--model.class_dropout=0", "--out", tmp_path / "run")
    assert outcome.is_one_clear_line(), outcome.err
    assert "--evaluation.reference DIR" in outcome.err
