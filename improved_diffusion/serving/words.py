"""How bot and page speak of jobs."""

from __future__ import annotations

from improved_diffusion.serving.queue import UNFINISHED, Job, Ticket
from improved_diffusion.serving.requests import (
    ClassRequest,
    ProcessRequest,
    Request,
    StickerRequest,
    TextRequest,
    TuneRequest,
)


def describe(request: Request) -> str:
    """What was asked for, in a few words."""
    if isinstance(request, ClassRequest):
        what = request.class_name.replace("_", " ") + (", step by step" if isinstance(request, ProcessRequest) else "")
    elif isinstance(request, TextRequest):
        what = _shortened(request.prompt)
    elif isinstance(request, StickerRequest):
        what = f"a sticker: {_shortened(request.prompt)}" if request.prompt else "a sticker"
    elif isinstance(request, TuneRequest):
        what = f"style {request.name}, {request.class_name}, from {len(request.uploads)} pictures"
    else:
        what = request.kind
    return f"{what} ({request.n} pictures)" if request.n > 1 else what


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def answer_of(ticket: Ticket) -> str:
    """How far a job is."""
    job = ticket.job
    if isinstance(job.request, TuneRequest) and job.state in UNFINISHED and job.progress > 0:
        return f"Learning: {round(100 * job.progress)} %, about {in_words(ticket.seconds)}"  # takes turns with others
    if job.state == "running":
        return f"Drawing: {10 * round(10 * job.progress)} %"
    if job.state == "queued":
        return f"Place {ticket.place} in the queue, about {in_words(ticket.seconds)}"
    return {"done": "Done", "cancelled": "Cancelled"}.get(job.state, "It could not be drawn")


def caption_of(job: Job) -> str:
    """What is said with a job's pictures."""
    request = job.request
    if isinstance(request, TuneRequest):
        return (
            f"Your style {request.name} is ready: /style {request.name}, then /prompt {{token}} {{class}} in the snow"
        )
    return f"{describe(request)}, seed {request.seed}"


def in_words(seconds: float) -> str:
    """A rough time: what changes every second is not worth an edit."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = max(1, round(seconds / 60))
    return "1 minute" if minutes == 1 else f"{minutes} minutes"
