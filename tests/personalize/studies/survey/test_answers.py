"""Answers that people send: nonsense is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.studies.survey.form import parse_answers


@pytest.mark.parametrize(
    "change",
    [
        {"survey": "another"},
        {"name": ""},
        {"name": "x" * 41},
        {"name": 5},
        {"session": "../../etc/passwd"},
        {"session": None},
        {"answers": {}},
        {"answers": []},
        {"answers": {"unknown": {"prompt": 1}}},
        {"answers": {"a": {"beauty": 1}}},
        {"answers": {"a": 3}},
        {"answers": {"a": {"prompt": 6}}},
        {"answers": {"a": {"prompt": -1}}},
        {"answers": {"a": {"prompt": 2.5}}},
        {"answers": {"a": {"prompt": True}}},
        {"answers": {"a": {"prompt": None}}},
        {"more": 1},
    ],
)
def test_nonsense_is_refused(change, small_key, answers_as_sent):
    with pytest.raises(UserError):
        parse_answers(json.dumps(answers_as_sent(small_key) | change).encode(), small_key)


@given(st.one_of(st.binary(), st.recursive(st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())))
def test_whatever_comes_is_refused_in_words(small_key, text):
    with pytest.raises(UserError):
        parse_answers(text, small_key)


def test_bottomless_json_is_refused(small_key):
    with pytest.raises(UserError):
        parse_answers(b"[" * 1_000_000, small_key)
