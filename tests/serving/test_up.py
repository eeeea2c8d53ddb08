"""`serve.py up`, as somebody tries it out: a worker that dies is started again, and Ctrl-C ends all."""

from __future__ import annotations


