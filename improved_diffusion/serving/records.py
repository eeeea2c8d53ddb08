"""The worker's side of the tables: what was begun, how far it is, how it ended; and what it tells the clients."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from PIL import Image

from improved_diffusion.files import atomic_write
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.database import counter, facts, jobs, put, workers
from improved_diffusion.serving.queue import UNFINISHED, Job, job_of

MEMORY_OF_RATES = 0.8  # weight of what was measured before


@dataclass(frozen=True)
class Encoded:
    """A picture's file, to be kept as it is."""

    content: bytes
    suffix: str  # .webp, say


class Records:
    """What a worker writes down, in the database of `engine`."""

    def __init__(self, config: ServingConfig, engine: sa.Engine):
        self.config = config
        self.engine = engine

    def find(self, job_id: str) -> Job | None:
        """A job that is still to be drawn."""
        with self.engine.connect() as connection:
            unfinished = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(UNFINISHED))
            row = connection.execute(unfinished).one_or_none()
        return None if row is None else job_of(row)

    def begin(self, job_ids: Collection[str]) -> list[Job]:
        """Those of the jobs that are still wanted, which now run. What the worker has died of too often is parked."""
        now = time.time()
        too_often = jobs.c.attempts >= self.config.limits.attempts
        wanted = sa.and_(jobs.c.id.in_(job_ids), jobs.c.state.in_(UNFINISHED))
        parked = {"state": "parked", "finished": now, "error": "the worker died of it again and again: it is put aside"}
        running = {"state": "running", "attempts": jobs.c.attempts + 1}
        running["started"] = sa.func.coalesce(jobs.c.started, now)
        with self.engine.begin() as connection:
            connection.execute(jobs.update().where(wanted, too_often).values(parked))
            rows = connection.execute(jobs.update().where(wanted).values(running).returning(jobs)).all()
            if rows:
                latest = max(row.start for row in rows)
                connection.execute(counter.update().where(counter.c.virtual < latest).values(virtual=latest))
        return sorted((job_of(row) for row in rows), key=lambda job: (job.start, job.number))

    def report(self, job_ids: Collection[str], progress: float) -> set[str]:
        """Write how far jobs are that are drawn together; returns those that nobody has cancelled."""
        mine = sa.and_(jobs.c.id.in_(job_ids), jobs.c.state == "running")
        with self.engine.begin() as connection:
            return set(connection.scalars(jobs.update().where(mine).values(progress=progress).returning(jobs.c.id)))

    def finish(self, job: Job, images: Sequence[Image.Image | Encoded]) -> None:
        """Keep a job's pictures, as PNG where they are not encoded yet, unless it was cancelled or removed meanwhile.

        Raises:
            UserError: they cannot be written.
        """
        suffixes = [image.suffix if isinstance(image, Encoded) else ".png" for image in images]
        files = [f"{job.id}/{number}{suffix}" for number, suffix in enumerate(suffixes)]
        folder = self.config.results
        for name, image in zip(files, images, strict=True):
            with atomic_write(folder / name) as temporary:
                if isinstance(image, Encoded):
                    temporary.write_bytes(image.content)
                else:
                    image.save(temporary, format="png")
        size = sum(file.stat().st_size for file in (folder / job.id).rglob("*") if file.is_file())
        if not self._end(job.id, state="done", progress=1.0, files=files, bytes=size) and not self._is_done(job.id):
            shutil.rmtree(folder / job.id, ignore_errors=True)

    def fail(self, job: Job, reason: str) -> None:
        """End a job that cannot be drawn, for a reason that its user is told."""
        self._end(job.id, state="failed", error=reason)

    def give_back(self, job_ids: Collection[str]) -> None:
        """Jobs that were begun go back into the queue, as if they had not been."""
        mine = sa.and_(jobs.c.id.in_(job_ids), jobs.c.state == "running")
        back = {"state": "queued", "progress": 0.0, "attempts": jobs.c.attempts - 1}
        with self.engine.begin() as connection:
            connection.execute(jobs.update().where(mine).values(back))

    def put_back(self, job: Job, seconds: float) -> Job | None:
        """Let a job that has had a turn of so many seconds wait for the next one; the worker did not die of this one.
        None if the job is no longer wanted."""
        mine = sa.and_(jobs.c.id == job.id, jobs.c.state == "running")
        back = {"state": "queued", "start": jobs.c.start + seconds, "attempts": 0}
        with self.engine.begin() as connection:
            row = connection.execute(jobs.update().where(mine).values(back).returning(jobs)).one_or_none()
        return None if row is None else job_of(row)

    def measured(self, kind: str, seconds_per_unit: float) -> None:
        """Let what was measured tell how long jobs of this kind take."""
        name = f"seconds of {kind}"
        with self.engine.begin() as connection:
            before = connection.scalar(sa.select(facts.c.value).where(facts.c.name == name))
            mean = seconds_per_unit
            if before is not None:
                mean = MEMORY_OF_RATES * before + (1 - MEMORY_OF_RATES) * seconds_per_unit
            put(connection, facts, name, value=mean)

    def publish(self, offer: Mapping[str, Any]) -> None:
        """Tell the clients what can be asked for."""
        with self.engine.begin() as connection:
            put(connection, facts, "offer", value=dict(offer))

    def sign_of_life(self, worker: str, report: Mapping[str, Any]) -> None:
        with self.engine.begin() as connection:
            put(connection, workers, worker, heartbeat=time.time(), report=dict(report))

    def sign_off(self, worker: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def _is_done(self, job_id: str) -> bool:
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(jobs.c.state).where(jobs.c.id == job_id)) == "done"

    def _end(self, job_id: str, **values: Any) -> bool:
        """Whether it was running."""
        mine = sa.and_(jobs.c.id == job_id, jobs.c.state == "running")
        with self.engine.begin() as connection:
            done = connection.execute(jobs.update().where(mine).values(finished=time.time(), **values))
        return done.rowcount == 1
