"""What has expired goes: finished jobs with their pictures, uploads, and what is left of jobs that came to nothing."""

from __future__ import annotations

import shutil
import time

import sqlalchemy as sa

from improved_diffusion.serving.database import hold_queue, jobs, uploads
from improved_diffusion.serving.queue import FINISHED, IS_TUNE, UNFINISHED, JobQueue
from improved_diffusion.serving.requests import uploads_in

REMOVED_AT_ONCE = 1000  # jobs; a statement can name some ten thousand
SECONDS_TO_RECORD = 3600.0  # an upload in the database, once its file is written


def remove_expired(queue: JobQueue) -> int:
    """Remove what is older than the limits allow; an upload that an unfinished job starts from stays. Returns how many
    jobs and uploads."""
    limits, now = queue.config.limits, time.time()
    hours = sa.case((sa.and_(IS_TUNE, jobs.c.state == "done"), limits.styles_hours), else_=limits.results_hours)
    old_job = sa.and_(jobs.c.state.in_(FINISHED), jobs.c.finished < now - 3600 * hours)
    old_upload = uploads.c.created < now - 3600 * limits.uploads_hours
    with queue.engine.connect() as connection:
        names = connection.scalars(sa.select(jobs.c.id).where(old_job).limit(REMOVED_AT_ONCE)).all()
    queue.remove(names)
    with queue.engine.begin() as connection:
        hold_queue(connection)  # or a job that starts from one of them could come in between
        in_use = connection.scalars(sa.select(jobs.c.request).where(jobs.c.state.not_in(FINISHED))).all()
        pictures = set(connection.scalars(sa.select(uploads.c.id).where(old_upload)))
        pictures -= {name for request in in_use for name in uploads_in(request)}
        connection.execute(uploads.delete().where(uploads.c.id.in_(pictures)))
        for picture in pictures:  # before it is sent again
            (queue.config.uploads / picture).unlink(missing_ok=True)
    return len(names) + len(pictures)


def remove_leftovers(queue: JobQueue) -> None:
    """Remove what was written for jobs that then failed, or were cancelled or removed; and pictures that the database
    does not know, for who wrote or removed them died in between."""
    files = [file for file in queue.config.uploads.iterdir() if file.stat().st_mtime < time.time() - SECONDS_TO_RECORD]
    folders = [folder.name for folder in queue.config.results.iterdir()]  # first: what is accepted later has none yet
    with queue.engine.connect() as connection:
        wanted = connection.scalars(sa.select(jobs.c.id).where(jobs.c.state.in_((*UNFINISHED, "done")))).all()
        known = set(connection.scalars(sa.select(uploads.c.id)))
    for file in files:
        if file.name not in known:
            file.unlink(missing_ok=True)
    for name in set(folders) - set(wanted):
        shutil.rmtree(queue.config.results / name, ignore_errors=True)
