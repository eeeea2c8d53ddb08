"""The server of a survey: the page, and the answers to it."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from improved_diffusion.personalize.studies.survey.server import LARGEST


def test_server_serves_the_page_and_nothing_else(server, page):
    address = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(f"{address}/", timeout=10) as reply:
        assert reply.read() == page.read_bytes()
    for path in ("survey.key.json", "survey.html", "../out/survey.key.json", "answers"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{path}", timeout=10)


def test_server_keeps_what_many_send_at_once(server, post, answers_as_sent, tmp_path):
    names = ["Ada", *(f"Person {number}" for number in range(22)), "Ada"]
    sent = [answers_as_sent(server.key, name, f"{number:016x}") for number, name in enumerate(names)]
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda answers: post(json.dumps(answers).encode()), [*sent, *sent]))
    assert statuses == [200] * 48
    files = sorted((tmp_path / "answers").iterdir())
    kept = [json.loads(file.read_text()) for file in files]
    assert sorted(kept, key=lambda answers: answers["session"]) == sent
    assert files[0].name == f"answers-Ada-{0:016x}.json"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}", b"\xff"])
def test_server_refuses_nonsense(content, post, tmp_path):
    assert post(content) == 400
    assert not (tmp_path / "answers").exists()


def test_server_refuses_answers_to_another_survey(small_key, answers_as_sent, post, tmp_path):
    assert post(json.dumps(answers_as_sent(small_key)).encode()) == 400
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(("length", "status"), [(str(LARGEST + 1), 413), ("much", 400), ("-1", 400), (None, 400)])
def test_server_refuses_by_length_before_it_reads(length, status, server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest("POST", "/answers")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_server_says_when_it_cannot_keep(server, post, answers_as_sent, tmp_path):
    (tmp_path / "answers").write_text("a file where the folder should be")
    assert post(json.dumps(answers_as_sent(server.key)).encode()) == 500


@pytest.mark.usefixtures("small_key_file")  # beside a page that is of another survey
def test_serve_refuses(page, server, tmp_path, run_script):
    shutil.copy(page, tmp_path / "s.html")
    for arguments, complaint in [
        ([tmp_path / "s.html"], "is the key of another survey"),
        ([tmp_path / "none.html"], "no key"),
        ([page, "--port", server.server_port], "cannot serve"),
        ([page, "--port", 70_000], "cannot serve"),
    ]:
        outcome = run_script("personalize.py", "survey", "serve", *arguments, "--answers", tmp_path / "answers")
        assert outcome.is_one_clear_line()
        assert complaint in outcome.err
