from __future__ import annotations

import multiprocessing

import pytest


@pytest.fixture
def forked(monkeypatch) -> None:
    """The processes that decode are forks of this one, so that none takes a third of a second to start."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
