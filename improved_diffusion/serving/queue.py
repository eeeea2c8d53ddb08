"""The queue as its clients see it: they submit, look, cancel and fetch, and never draw.

Fairness is start-time fair queueing (Goyal, Vin & Cheng 1996): a job's virtual start is when its user's jobs before it
would end if each user had a device of the same speed, and jobs are taken in that order. Who asks for ten things waits
for nine of them behind everyone who asks for one. A style is learned in chunks, each with a start of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy import func

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.database import (
    counter,
    deliveries,
    facts,
    jobs,
    open_database,
    packs,
    preferences,
    take_number,
    updates,
    uploads,
    workers,
)
from improved_diffusion.serving.requests import Request, TuneRequest, request_of, uploads_in

QUEUE, WORKFLOW, VERSION = "device", "draw", "1"  # of DBOS; the version is that of what the jobs mean
PER_SECOND = 10  # of DBOS's whole-numbered priorities: 6.8 years fit
SECONDS_PER_UNIT = 0.05  # of a kind of work that has not been measured
ALIVE = 60.0  # seconds since a worker's last sign of life
UNFINISHED, FINISHED = ("queued", "running"), ("done", "failed", "parked", "cancelled")
IS_TUNE = jobs.c.request["kind"].as_string() == TuneRequest.kind


class Busy(UserError):
    """The queue, or the user's part of it, or the disk, is full. The message says so, and what to do."""


@dataclass(frozen=True)
class Job:
    """One, as it stands."""

    id: str
    user: str
    request: Request
    origin: dict[str, Any]
    state: str  # queued, running, done, failed, parked or cancelled
    attempts: int
    progress: float  # 0 to 1
    created: float
    started: float | None
    finished: float | None
    files: tuple[str, ...]
    error: str | None
    cost: float
    start: float
    number: int


@dataclass(frozen=True)
class Ticket:
    """The answer to a job that was accepted."""

    job: Job
    place: int  # 1 is next; 0 has begun
    seconds: float  # until it is expected to be done


class JobQueue:
    """The queue of the server that `config` describes. Safe to use from several threads.

    Raises:
        UserError: it has not been made.
    """

    def __init__(self, config: ServingConfig):
        self.config = config
        self.engine = open_database(config)
        self.client = DBOSClient(
            system_database_engine=self.engine, serializer=DBOSPortableJSONSerializer(), retry_connection_errors=False
        )

    def close(self) -> None:
        self.client.destroy()
        self.engine.dispose()

    def offer(self, user: str | None = None) -> Mapping[str, Any]:
        """What the worker has said that it can draw; for a user, with the styles of one's own.

        Raises:
            UserError: none has been started yet.
        """
        offer = self._fact("offer")
        if offer is None:
            raise UserError("no worker has been started here yet: python serve.py worker")
        return offer if user is None else {**offer, "styles": [*offer["styles"], *self.styles_of(user)]}

    def styles_of(self, user: str) -> dict[str, str]:
        """{name: job that learned it} of a user's own styles."""
        return {job.request.name: job.id for job in self._jobs(jobs.c.user == user, IS_TUNE, jobs.c.state == "done")}

    def submit(
        self, user: str, request: Request, job_id: str | None = None, origin: Mapping[str, Any] | None = None
    ) -> Ticket:
        """Queue a job; when this returns it is on disk.

        Args:
            user: whose it is.
            request: what is wanted.
            job_id: of the client's choice, so that to submit it again, after a crash say, changes nothing.
            origin: what the client wants to remember with it.

        Raises:
            Busy: there is no room.
            UserError: a request that cannot be fulfilled.
        """
        offer, own = self.offer(user), self.styles_of(user)
        job_id = job_id or uuid.uuid4().hex
        with self.engine.begin() as connection:
            number = take_number(connection)
            known = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one_or_none()
            if known is None:
                request.check(self.config.limits, offer)
                if (style := getattr(request, "style", None)) in own:
                    request = dataclasses.replace(request, style=own[style])  # another's may have that name
                self._require_room(connection, user, request)
                self._require_uploads(connection, user, request)
                cost = max(0.1, request.work * self._seconds_per_unit(connection, request.kind))
                start = self._virtual_start(connection, user)
                values = {"id": job_id, "number": number, "user": user, "request": request.plain(), "cost": cost}
                values |= {"origin": dict(origin or {}), "start": start, "state": "queued", "created": time.time()}
                connection.execute(jobs.insert().values(values))
                options = {"queue_name": QUEUE, "workflow_name": WORKFLOW, "workflow_id": job_id}
                options |= {"priority": 1 + round(start * PER_SECOND), "app_version": VERSION}
                self.client.enqueue_in_transaction(connection, options, job_id)
        return self.ticket(job_id)

    def ticket(self, job_id: str) -> Ticket:
        """A job's place, and when it is expected to be done. Raises UserError where there is no such job."""
        job = self.job(job_id)
        if job.state in FINISHED:
            return Ticket(job, 0, 0.0)
        mine = (job.start, job.number)
        with self.engine.connect() as connection:
            order = sa.tuple_(jobs.c.start, jobs.c.number)
            ahead = sa.or_(jobs.c.state == "running", sa.and_(jobs.c.state == "queued", order < sa.tuple_(*mine)))
            left = func.sum(self._turn(jobs.c.cost * (1 - jobs.c.progress)))
            others = sa.select(func.count(), left).where(ahead, jobs.c.id != job_id)
            count, seconds = connection.execute(others).one()
            alive = func.count(workers.c.id)
            hands = connection.scalar(sa.select(alive).where(workers.c.heartbeat > time.time() - ALIVE)) or 1
        own = job.cost * (1 - job.progress)
        if job.state == "running":
            return Ticket(job, 0, own)
        return Ticket(job, 1 + count, (seconds or 0.0) / hands + own)

    def job(self, job_id: str) -> Job:
        """Raises UserError where there is none."""
        found = self._jobs(jobs.c.id == job_id)
        if not found:
            raise UserError(f"there is no job {job_id}: it was removed, or never was")
        return found[0]

    def jobs_of(self, user: str, states: Sequence[str] = (*UNFINISHED, *FINISHED)) -> list[Job]:
        """A user's jobs in these states, in the order in which they came."""
        return self._jobs(jobs.c.user == user, jobs.c.state.in_(states))

    def jobs_in(self, states: Sequence[str], users: str = "") -> list[Job]:
        """All jobs in these states of users whose names begin with `users`."""
        return self._jobs(jobs.c.state.in_(states), jobs.c.user.startswith(users, autoescape=True))

    def files(self, job: Job) -> list[Path]:
        """A finished job's pictures."""
        return [self.config.results / name for name in job.files]

    def set_origin(self, job_id: str, origin: Mapping[str, Any]) -> None:
        """Remember something else with a job."""
        with self.engine.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(origin=dict(origin)))

    def cancel(self, job_id: str, user: str) -> bool:
        """Cancel a user's job: one that waits never runs, one that runs stops at its next step. Whether there was
        anything to cancel."""
        with self.engine.begin() as connection:
            mine = sa.and_(jobs.c.id == job_id, jobs.c.user == user, jobs.c.state.in_(UNFINISHED))
            was = connection.execute(
                jobs.update().where(mine).values(state="cancelled", finished=time.time()).returning(jobs.c.attempts)
            ).one_or_none()
        if was is not None and was.attempts == 0:
            self.client.cancel_workflow(job_id)  # takes it out of DBOS's queue; what has begun sees it by itself
        return was is not None

    def style_of(self, user: str) -> str | None:
        """The style that a user has chosen; None for the base, or where that style has gone."""
        with self.engine.connect() as connection:
            style = connection.scalar(sa.select(preferences.c.style).where(preferences.c.user == user))
        return style if style is None or style in self.offer(user)["styles"] else None

    def choose_style(self, user: str, style: str | None) -> None:
        """Remember a user's choice of style; None is the base without one. Raises UserError if there is no such."""
        styles = self.offer(user)["styles"]
        if style is not None and style not in styles:
            raise UserError(f"there is no style {style!r}; there are: {', '.join(styles) or 'none'}")
        with self.engine.begin() as connection:
            connection.execute(preferences.delete().where(preferences.c.user == user))
            connection.execute(preferences.insert().values(user=user, style=style))

    def forget_style(self, user: str, name: str) -> None:
        """Remove a style of a user's own. Raises UserError if there is no such."""
        own = self.styles_of(user)
        if name not in own:
            raise UserError(f"you have no style {name!r} of your own; you have: {', '.join(own) or 'none'}")
        self.remove([own[name]])

    def unused_uploads(self, user: str) -> list[str]:
        """A user's pictures with which nothing was asked for since they were sent, in the order in which they came."""
        used = {name: job.created for job in self.jobs_of(user) for name in uploads_in(job.request.plain())}
        with self.engine.connect() as connection:
            rows = connection.execute(
                sa.select(uploads).where(uploads.c.user == user).order_by(uploads.c.created)
            ).all()
        return [row.id for row in rows if row.created > used.get(row.id, 0.0)]

    def purge(self, user: str) -> int:
        """Remove everything of a user: jobs, pictures, uploads, ledger, packs, preferences. Returns how many jobs."""
        found = self._jobs(jobs.c.user == user)
        self.remove([job.id for job in found])
        with self.engine.begin() as connection:
            names = connection.scalars(sa.select(uploads.c.id).where(uploads.c.user == user)).all()
            for table in (uploads, packs, preferences, updates):
                connection.execute(table.delete().where(table.c.user == user))
        for name in names:
            (self.config.uploads / name).unlink(missing_ok=True)
        return len(found)

    def remove(self, job_ids: Sequence[str]) -> None:
        """Remove jobs, whatever their state, with their pictures and their rows in the ledger."""
        if not job_ids:
            return
        self.client.cancel_workflows(list(job_ids))  # first: if it fails, who tries again still finds the jobs
        self.client.delete_workflows(list(job_ids))
        with self.engine.begin() as connection:  # before the pictures: a worker that draws one then keeps nothing of it
            connection.execute(jobs.delete().where(jobs.c.id.in_(job_ids)))
            connection.execute(deliveries.delete().where(deliveries.c.job.in_(job_ids)))
        for job_id in job_ids:
            shutil.rmtree(self.config.results / job_id, ignore_errors=True)

    def _jobs(self, *conditions: sa.ColumnElement[bool]) -> list[Job]:
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(jobs).where(*conditions).order_by(jobs.c.number)).all()
        return [job_of(row) for row in rows]

    def _fact(self, name: str) -> Any:
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(facts.c.value).where(facts.c.name == name))

    @staticmethod
    def _seconds_per_unit(connection: sa.Connection, kind: str) -> float:
        measured = connection.scalar(sa.select(facts.c.value).where(facts.c.name == f"seconds of {kind}"))
        return SECONDS_PER_UNIT if measured is None else measured

    def _turn(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[float]:
        """For how much of the seconds that a job takes it keeps the device: of learning a style a chunk."""
        chunk = self.config.limits.chunk_seconds
        return sa.case((sa.and_(IS_TUNE, seconds > chunk), chunk), else_=seconds)

    def _virtual_start(self, connection: sa.Connection, user: str) -> float:
        """When the user's jobs before would end, but not before now in virtual time."""
        end = func.max(jobs.c.start + self._turn(jobs.c.cost))
        ends = sa.select(end).where(jobs.c.user == user, jobs.c.state != "cancelled")
        return max(connection.scalar(ends) or 0.0, connection.scalar(sa.select(counter.c.virtual)))

    def _require_room(self, connection: sa.Connection, user: str, request: Request) -> None:
        limits = self.config.limits
        unfinished = sa.select(func.count()).select_from(jobs).where(jobs.c.state.in_(UNFINISHED))
        if connection.scalar(unfinished.where(jobs.c.user == user)) >= limits.queued_per_user:
            raise Busy(f"you have {limits.queued_per_user} jobs under way already: wait for one, or cancel one")
        if connection.scalar(unfinished) >= limits.queued:
            raise Busy(f"busy: {limits.queued} jobs are under way already, please try again in some minutes")
        if isinstance(request, TuneRequest):
            self._require_room_to_learn(connection, user, request.name)
        require_disk(connection, self.config)

    def _require_room_to_learn(self, connection: sa.Connection, user: str, name: str) -> None:
        limits = self.config.limits
        kept = sa.select(jobs.c.request["name"].as_string()).where(IS_TUNE, jobs.c.state.in_((*UNFINISHED, "done")))
        own = connection.scalars(kept.where(jobs.c.user == user)).all()
        if name in own:
            raise UserError(f"there is a style {name!r} of yours already: choose another name, or remove it first")
        if len(own) >= limits.styles_per_user:
            raise Busy(f"you have {len(own)} styles already, {', '.join(own)}: remove one first")
        if len(connection.scalars(kept.where(jobs.c.state != "done")).all()) >= limits.tunes:
            raise Busy(f"busy: {limits.tunes} styles are being learned already, please try again later")

    @staticmethod
    def _require_uploads(connection: sa.Connection, user: str, request: Request) -> None:
        needed = uploads_in(request.plain())
        mine = sa.and_(uploads.c.id.in_(needed), uploads.c.user == user)
        if len(connection.scalars(sa.select(uploads.c.id).where(mine)).all()) < len(needed):
            raise UserError("the picture to start from is gone: send it again")


def require_disk(connection: sa.Connection, config: ServingConfig) -> None:
    """Raise Busy where results and uploads fill what they may."""
    used = sum(connection.scalar(sa.select(func.sum(table.c.bytes))) or 0 for table in (jobs, uploads))
    if used >= config.limits.disk_bytes:
        raise Busy("busy: the disk is full, please try again when older results have expired")


def job_of(row: Any) -> Job:
    """The job in a row of the table."""
    names = Job.__dataclass_fields__
    values = {name: getattr(row, name) for name in names}
    return Job(**{**values, "request": request_of(row.request), "files": tuple(row.files)})
