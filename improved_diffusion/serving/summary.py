"""How the queue stands: for `serve.py status`, the status page and Prometheus."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func

from improved_diffusion.serving.database import deliveries, jobs, uploads, workers
from improved_diffusion.serving.queue import ALIVE, FINISHED, UNFINISHED, JobQueue

RECENT = 3600.0  # seconds that waits and throughput look back


@dataclass(frozen=True)
class Summary:
    """The queue at a moment."""

    states: dict[str, int]
    """{state: jobs in it}, as far as they have not expired."""
    users: int
    """With jobs under way."""
    oldest: float
    """Seconds that the oldest job that is still queued has waited."""
    wait_median: float
    wait_longest: float
    """Seconds from acceptance until drawing began, of the jobs that were begun in the last hour."""
    images_per_minute: float
    """Over the last hour, or since the first result in it."""
    bytes_on_disk: int
    unsure: int
    """Results of which nobody knows whether they were delivered."""
    workers: dict[str, Mapping[str, Any]]
    """{name: what it reports} of those alive."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.states.items() if count) or "none"
        lines = [
            f"jobs        {counts}; {self.users} users have jobs under way",
            f"waits       median {self.wait_median:.1f} s, longest {self.wait_longest:.1f} s in the last hour; "
            f"the oldest queued one has waited {self.oldest:.1f} s",
            f"throughput  {self.images_per_minute:.1f} images a minute",
            f"disk        {self.bytes_on_disk / 1e6:.1f} MB of results and uploads",
            f"deliveries  {self.unsure} unsure",
        ]
        for name, report in self.workers.items():
            lines.append(f"worker      {name}: {', '.join(f'{what} {value}' for what, value in report.items())}")
        return "\n".join(lines if self.workers else [*lines, "worker      none is alive"])


def summarize(queue: JobQueue) -> Summary:
    """How a queue stands now."""
    now = time.time()
    with queue.engine.connect() as connection:
        counted = dict(connection.execute(sa.select(jobs.c.state, func.count()).group_by(jobs.c.state)).all())
        under_way = jobs.c.state.in_(UNFINISHED)
        users = connection.scalar(sa.select(func.count(sa.distinct(jobs.c.user))).where(under_way))
        oldest = connection.scalar(sa.select(func.min(jobs.c.created)).where(jobs.c.state == "queued"))
        waits = connection.scalars(sa.select(jobs.c.started - jobs.c.created).where(jobs.c.started > now - RECENT))
        waits = waits.all()
        recent = sa.select(jobs.c.finished, jobs.c.files).where(jobs.c.finished > now - RECENT, jobs.c.state == "done")
        done = connection.execute(recent.order_by(jobs.c.finished)).all()
        size = sum(connection.scalar(sa.select(func.sum(table.c.bytes))) or 0 for table in (jobs, uploads))
        unsure = connection.scalar(sa.select(func.count()).where(deliveries.c.state == "sending"))
        alive = connection.execute(sa.select(workers).where(workers.c.heartbeat > now - ALIVE).order_by(workers.c.id))
        reports = {row.id: row.report for row in alive}
    images = sum(len(row.files) for row in done)
    return Summary(
        states={state: counted.get(state, 0) for state in (*UNFINISHED, *FINISHED)},
        users=users,
        oldest=now - oldest if oldest else 0.0,
        wait_median=statistics.median(waits) if waits else 0.0,
        wait_longest=max(waits, default=0.0),
        images_per_minute=60 * images / max(1.0, now - done[0].finished) if done else 0.0,
        bytes_on_disk=size,
        unsure=unsure,
        workers=reports,
    )
