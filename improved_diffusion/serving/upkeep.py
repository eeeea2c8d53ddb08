"""What has expired goes: finished jobs with their pictures, and uploads."""

from __future__ import annotations

import time

import sqlalchemy as sa

from improved_diffusion.serving.database import jobs, uploads
from improved_diffusion.serving.queue import FINISHED, JobQueue


def remove_expired(queue: JobQueue) -> int:
    """Remove what is older than the limits allow; an upload that an unfinished job starts from stays. Returns how many
    jobs and uploads."""
    limits, now = queue.config.limits, time.time()
    old_job = sa.and_(jobs.c.state.in_(FINISHED), jobs.c.finished < now - 3600 * limits.results_hours)
    old_upload = uploads.c.created < now - 3600 * limits.uploads_hours
    with queue.engine.connect() as connection:
        names = connection.scalars(sa.select(jobs.c.id).where(old_job)).all()
        in_use = connection.scalars(sa.select(jobs.c.request).where(jobs.c.state.not_in(FINISHED))).all()
        pictures = set(connection.scalars(sa.select(uploads.c.id).where(old_upload)))
    queue.remove(names)
    pictures -= {request.get("upload") for request in in_use}
    with queue.engine.begin() as connection:
        connection.execute(uploads.delete().where(uploads.c.id.in_(pictures)))
    for picture in pictures:
        (queue.config.uploads / picture).unlink(missing_ok=True)
    return len(names) + len(pictures)
