"""Who was sent what. A row is written before a result is sent and again after it: a client that dies in between never
sends it again of its own accord, and the result counts as unsure until its user asks for it.

Exactly once is impossible towards a chat service; at most once, with a way to ask, is this."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from improved_diffusion.serving.database import deliveries, jobs, packs, put
from improved_diffusion.serving.queue import Job, job_of

TO_DELIVER = ("done", "failed", "parked")  # who cancels a job needs no word of its end


class Ledger:
    """That of the database of `engine`."""

    def __init__(self, engine: sa.Engine):
        self.engine = engine

    def undelivered(self, users: str) -> list[Job]:
        """Ended jobs of which nothing was sent, of users whose names begin with `users`, in the order they ended."""
        return self._jobs(users, deliveries.c.job.is_(None))

    def unsure(self, user: str) -> list[Job]:
        """A user's ended jobs of which nobody knows whether they arrived."""
        return self._jobs(user, jobs.c.user == user, deliveries.c.state != "sent")

    def claim(self, job_id: str) -> bool:
        """Note that a result is about to be sent. False if it is not to be: that was noted before, or it is gone."""
        row = sa.select(jobs.c.id, sa.literal("sending"), sa.literal(time.time())).where(jobs.c.id == job_id)
        try:
            with self.engine.begin() as connection:
                claim = deliveries.insert().from_select(["job", "state", "at"], row).returning(deliveries.c.job)
                return connection.scalar(claim) is not None
        except sa.exc.IntegrityError:
            return False

    def confirm(self, job_id: str, state: str = "sent") -> None:
        """Note what came of it: sent, or refused."""
        with self.engine.begin() as connection:
            mine = deliveries.c.job == job_id
            connection.execute(deliveries.update().where(mine).values(state=state, at=time.time()))

    def withdraw(self, job_id: str) -> None:
        """It was surely not sent, and is to be."""
        with self.engine.begin() as connection:
            connection.execute(deliveries.delete().where(deliveries.c.job == job_id))

    def _jobs(self, users: str, *conditions: sa.ColumnElement[bool]) -> Sequence[Job]:
        ended = (jobs.c.state.in_(TO_DELIVER), jobs.c.user.startswith(users, autoescape=True))
        joined = sa.select(jobs).outerjoin(deliveries, deliveries.c.job == jobs.c.id)
        with self.engine.connect() as connection:
            rows = connection.execute(joined.where(*ended, *conditions).order_by(jobs.c.finished)).all()
        return [job_of(row) for row in rows]


@dataclass(frozen=True)
class PackEntry:
    """A sticker in a pack, or on its way there."""

    job: str
    number: int  # of the user's pack
    before: tuple[str, ...]  # the stickers that were in it before
    sticker: str | None  # as Telegram calls it there; None as long as nobody knows that it has arrived


class PackLedger:
    """Which sticker is in which of its user's packs. A row is written before a sticker is added, with what is in the
    pack then, and again after it: if the client dies in between, the pack itself tells whether it has arrived."""

    def __init__(self, engine: sa.Engine):
        self.engine = engine

    def find(self, job_id: str, user: str) -> PackEntry | None:
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(packs).where(packs.c.job == job_id, packs.c.user == user)).one_or_none()
        return None if row is None else PackEntry(row.job, row.number, tuple(row.before), row.sticker)

    def latest(self, user: str) -> int:
        """The number of a user's latest pack; of one who has none yet, 1."""
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.max(packs.c.number)).where(packs.c.user == user)) or 1

    def stickers(self, user: str) -> set[str]:
        """What is known to be in a user's packs."""
        with self.engine.connect() as connection:
            return set(connection.scalars(sa.select(packs.c.sticker).where(packs.c.user == user)))

    def begin(self, user: str, entry: PackEntry) -> None:
        """Note that a sticker is about to be added."""
        values = {"number": entry.number, "before": list(entry.before), "sticker": entry.sticker}
        with self.engine.begin() as connection:
            put(connection, packs, entry.job, user=user, **values)

    def confirm(self, job_id: str, sticker: str) -> None:
        """Note that it is in its pack."""
        with self.engine.begin() as connection:
            connection.execute(packs.update().where(packs.c.job == job_id).values(sticker=sticker))

    def forget(self, job_id: str) -> None:
        """It is in no pack."""
        with self.engine.begin() as connection:
            connection.execute(packs.delete().where(packs.c.job == job_id))
