"""The one thread that draws. Workflows hand it jobs and wait; it draws those of equal settings together, and sees to it
that one job's end, be it for want of memory, is not another's."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NoReturn, Protocol

import sqlalchemy as sa
import torch
from PIL import Image

from improved_diffusion.errors import UserError, is_device_lost, is_out_of_memory
from improved_diffusion.serving.queue import Job
from improved_diffusion.serving.records import Encoded, Records
from improved_diffusion.serving.requests import Request, TuneRequest

SECONDS_BETWEEN_REPORTS = 0.5
SECONDS_TO_GATHER = 0.05  # what is claimed at once comes one by one
DEVICE_LOST = 70  # exit status
NO_MEMORY = "the device has too little memory for this: ask for fewer or smaller pictures"
BROKEN = "something went wrong while this was drawn; the operator's log says what"

OnProgress = Callable[[float], None]
MayGoOn = Callable[[float], bool]


class Drawer(Protocol):
    """What draws jobs of one kind."""

    def draw(self, requests: Sequence[Request], on_progress: OnProgress) -> list[list[Image.Image | Encoded]]:
        """The pictures of each request, all of one `group`: the same as if each were drawn alone. Calls `on_progress`
        with a number from 0 to 1 at every step, which may raise to stop it."""

    def release(self) -> None:
        """Give back all memory that can be got again."""


class Learner(Protocol):
    """What learns styles, a chunk at a time."""

    def learn(self, job: Job, may_go_on: MayGoOn) -> list[Image.Image] | None:
        """Go on with a job from where it was left, be it by a worker that was killed. Calls `may_go_on` with a number
        from 0 to 1 before every update, which may raise; when it says no, what was learned is kept on disk.

        Returns:
            Pictures in the style; None while it is not done.
        """

    def release(self) -> None:
        """Give back all memory that can be got again."""


class _Abandoned(Exception):
    """Nobody waits for what is being drawn any more."""


class _ChunkOver(Exception):
    """It is others' turn."""


class Stopped(BaseException):
    """The worker is to end. No Exception, so that DBOS does not take it for the end of a job."""


class Device:
    """The thread, from `start` to `stop`.

    Args:
        drawers: {kind of request: what draws it}.
        records: where jobs are found and their ends written.
        batch_size: images drawn at once.
        chunk_seconds: for which a style is learned at a time.
    """

    def __init__(
        self, drawers: Mapping[str, Drawer | Learner], records: Records, batch_size: int, chunk_seconds: float
    ):
        self.drawers = drawers
        self.records = records
        self.batch_size = batch_size
        self.chunk_seconds = chunk_seconds
        self._waiting: dict[str, tuple[Job, Future[None]]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop at the next step of what is being drawn, which goes back into the queue. Raises Stopped in who waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        for _, done in self._waiting.values():
            done.set_exception(Stopped())

    def draw(self, job_id: str) -> Future[None]:
        """Have a job drawn; the future is done when its end is written down, and raises what kept it from that."""
        done: Future[None] = Future()
        job = self.records.find(job_id)
        if job is None:  # cancelled, or ended before a crash
            done.set_result(None)
            return done
        with self._changed:
            if self._stopping:
                raise Stopped
            self._waiting[job_id] = job, done
            self._changed.notify()
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                self._changed.wait_for(lambda: self._stopping, SECONDS_TO_GATHER)
                if self._stopping:
                    return
                chosen = self._choose()
                done = {job.id: self._waiting.pop(job.id)[1] for job in chosen}
            try:
                unfinished = self._draw_wanted(chosen)
            except (Stopped, Exception) as error:  # of the database, for one
                for one in done.values():
                    one.set_exception(error)
            else:
                with self._changed:
                    self._waiting |= {job.id: (job, done.pop(job.id)) for job in unfinished}
                for one in done.values():
                    one.set_result(None)

    def _choose(self) -> list[Job]:
        """The job whose turn it is, and those that can be drawn with it. What the worker has died of before is drawn
        alone, so that it takes no other one with it again."""
        order = sorted((job for job, _ in self._waiting.values()), key=lambda job: (job.start, job.number))
        first, chosen = order[0], []
        for job in order:
            fits = sum(other.request.n for other in (*chosen, job)) <= self.batch_size
            alike = job.request.group == first.request.group and not (job.attempts or first.attempts)
            if job is first or (fits and alike):
                chosen.append(job)
        return chosen

    def _draw_wanted(self, chosen: list[Job]) -> list[Job]:
        """Draw those of the jobs that are still wanted; returns what is to be gone on with."""
        jobs = self.records.begin([job.id for job in chosen])
        if jobs:
            return self._draw_begun(jobs)
        if isinstance(chosen[0].request, TuneRequest) and chosen[0].request.kind in self.drawers:
            self.drawers[chosen[0].request.kind].release()  # it was kept there for the next chunk
        return []

    def _draw_begun(self, jobs: list[Job]) -> list[Job]:
        began = time.monotonic()
        try:
            self._draw_or_divide(jobs)
        except _ChunkOver:
            unfinished = self.records.put_back(jobs[0], time.monotonic() - began)
            return [] if unfinished is None else [unfinished]
        except _Abandoned:
            pass
        except Stopped:
            self.records.give_back([job.id for job in jobs])
            raise
        except sa.exc.SQLAlchemyError:  # what happened is not written down: it is done again
            raise
        except Exception:
            traceback.print_exc()
            for job in jobs:
                self.records.fail(job, BROKEN)
        return []

    def _draw_or_divide(self, jobs: list[Job], last_try: bool = False) -> None:
        """Draw jobs together; if that fails, in smaller parts, until it is clear which one cannot be drawn."""
        kind, began = jobs[0].request.kind, time.monotonic()
        drawer = self.drawers.get(kind)
        if drawer is None:  # the settings were changed since
            for job in jobs:
                self.records.fail(job, f"this server draws no {kind} jobs any more")
            return
        try:
            if kind == TuneRequest.kind:
                drawn = [self._learn(jobs[0], drawer)]
            else:
                drawn = drawer.draw([job.request for job in jobs], self._drawing(jobs))
        except (_Abandoned, _ChunkOver, Stopped, sa.exc.SQLAlchemyError):
            raise
        except Exception as error:
            if is_device_lost(error):
                traceback.print_exc()
                die()
            no_memory = is_out_of_memory(error)
            if no_memory:
                for one in self.drawers.values():
                    one.release()
            elif not isinstance(error, UserError):
                traceback.print_exc()
            reason = NO_MEMORY if no_memory else str(error) if isinstance(error, UserError) else BROKEN
        else:
            for job, images in zip(jobs, drawn, strict=True):
                self._finish(job, images)
            if kind != TuneRequest.kind:
                work = sum(job.request.work for job in jobs)
                self.records.measured(kind, (time.monotonic() - began) / work)
            return
        # Outside of the handler: the error's traceback would hold on to what was being drawn.
        if len(jobs) > 1:
            half = len(jobs) // 2
            for part in (jobs[:half], jobs[half:]):
                with contextlib.suppress(_Abandoned):  # nobody waits for this part; for the other somebody may
                    self._draw_or_divide(part)
        elif no_memory and not last_try:
            self._draw_or_divide(jobs, last_try=True)  # now that memory was released
        else:
            self.records.fail(jobs[0], reason)

    def _learn(self, job: Job, learner: Learner) -> list[Image.Image]:
        """A style's pictures. Raises _ChunkOver while it is not learned."""
        report, moments = self._reporter([job]), []

        def may_go_on(progress: float) -> bool:
            report(progress)
            moments.append((time.monotonic(), progress))
            seconds = moments[-1][0] - moments[0][0]  # without what it took to begin
            return not self._stopping and seconds < self.chunk_seconds

        pictures = learner.learn(job, may_go_on)
        if len(moments) > 1:
            (began, first), (ended, last) = moments[0], moments[-1]
            self.records.measured(TuneRequest.kind, (ended - began) / (job.request.work * (last - first)))
        if pictures is None:
            raise _ChunkOver
        return pictures

    def _finish(self, job: Job, images: list[Image.Image | Encoded]) -> None:
        try:
            self.records.finish(job, images)
        except UserError:  # no space left, say
            traceback.print_exc()
            self.records.fail(job, BROKEN)

    def _drawing(self, jobs: list[Job]) -> OnProgress:
        """As `_reporter`; and it raises Stopped when the worker is to end."""
        report = self._reporter(jobs)

        def on_progress(progress: float) -> None:
            if self._stopping:
                raise Stopped
            report(progress)

        return on_progress

    def _reporter(self, jobs: list[Job]) -> OnProgress:
        """Writes progress down, not too often. It raises _Abandoned when nobody waits for the jobs any more."""
        last = 0.0

        def report(progress: float) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_REPORTS:
                last = time.monotonic()
                if not self.records.report([job.id for job in jobs], progress):
                    raise _Abandoned

        return report


def die() -> NoReturn:
    """End the process at once: a new one can use the device again, and this one has died of what it is drawing."""
    os._exit(DEVICE_LOST)


def release_memory() -> None:
    """What nothing refers to any more, and what PyTorch keeps of a GPU for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
