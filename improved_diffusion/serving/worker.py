"""The worker: the one process that owns a device. DBOS hands it the jobs, by virtual start, and again after a crash."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import torch
from dbos import DBOS, DBOSPortableJSONSerializer

from improved_diffusion.files import exclusive
from improved_diffusion.serving.config import ServingConfig
from improved_diffusion.serving.database import quieten_dbos, workers
from improved_diffusion.serving.device import Device, Drawer
from improved_diffusion.serving.queue import ALIVE, QUEUE, VERSION, WORKFLOW, JobQueue
from improved_diffusion.serving.records import Records
from improved_diffusion.serving.upkeep import remove_expired, remove_leftovers

SECONDS_BETWEEN_POLLS = 0.2  # of the queue
SECONDS_BETWEEN_SIGNS = 5.0  # of life
SECONDS_BETWEEN_CLEANINGS = 60.0


class Worker:
    """A worker at work, from `start` to `stop`.

    Args:
        config: of the server.
        drawers, offer: as `open_drawers` gives them.
        name: of its own among several on one database; its jobs are taken up again by a worker of the same name, or,
            when it has been silent for a minute, by any.
    """

    def __init__(
        self, config: ServingConfig, drawers: Mapping[str, Drawer], offer: Mapping[str, Any], name: str = "worker"
    ):
        self.config = config
        self.name = name
        self.queue = JobQueue(config)
        self.records = Records(config, self.queue.engine)
        self.device = Device(drawers, self.records, config.models.batch_size, config.limits.chunk_seconds)
        self.offer = offer
        self._at_work: set[str] = set()  # jobs that DBOS has started
        self._not_started: set[str] = set()  # jobs that it had claimed, but not started, when last looked at
        self._ended = threading.Event()
        self._upkeep = threading.Thread(target=self._keep_up, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin to draw what is queued."""
        quieten_dbos()
        # Twice a batch: what is claimed and waits for the device is what batches are made of. And all that is learned,
        # which stays claimed between its chunks.
        claimed = 2 * self.config.models.batch_size + self.config.limits.tunes
        self.queue.client.register_queue(QUEUE, worker_concurrency=claimed, polling_interval_sec=SECONDS_BETWEEN_POLLS)
        DBOS(
            config={
                "name": "serving",
                "system_database_url": self.config.database_url,
                "application_version": VERSION,
                "executor_id": self.name,
                "max_executor_threads": claimed + 8,
                "serializer": DBOSPortableJSONSerializer(),
                "run_migrations": False,
                "console_log_level": "ERROR",
            }
        )

        # What the worker dies of is counted, and parked, by Records.begin: job by job, and only while it is drawn.
        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        def draw(job_id: str) -> None:
            self._at_work.add(job_id)
            try:
                self._draw(job_id)
            finally:
                self._at_work.discard(job_id)

        DBOS.listen_queues([QUEUE])
        self.records.publish(self.offer)
        self._sign()
        self.device.start()
        DBOS.launch()
        self._upkeep.start()

    def stop(self) -> None:
        """Stop at the next step; what is under way stays queued."""
        self._ended.set()
        self.device.stop()
        DBOS.destroy(destroy_registry=True)
        self._upkeep.join()
        self.records.sign_off(self.name)
        self.queue.close()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def _draw(self, job_id: str) -> None:
        while True:  # a workflow that failed would not be run again
            try:
                return self.device.draw(job_id).result()
            except sa.exc.SQLAlchemyError:
                traceback.print_exc()
                time.sleep(SECONDS_BETWEEN_SIGNS)

    def _keep_up(self) -> None:
        cleaned = 0.0
        while not self._ended.wait(SECONDS_BETWEEN_SIGNS):
            try:
                self._sign()
                self._start_again()
                if time.monotonic() - cleaned >= SECONDS_BETWEEN_CLEANINGS:
                    cleaned = time.monotonic()
                    remove_expired(self.queue)
                    remove_leftovers(self.queue)
            except Exception:  # the database is away for a moment, say; without signs of life others would take over
                traceback.print_exc()

    def _sign(self) -> None:
        self.records.sign_of_life(self.name, {"draws": " and ".join(self.device.drawers), "memory": memory_used()})

    def _start_again(self) -> None:
        """Queue again what is claimed and at work nowhere: by a worker that is gone, or gives no sign of life any more;
        or by this one, where DBOS failed to start it, of which it logs the error and no more."""
        claimed = self.queue.client.list_workflows(status="PENDING", load_input=False)
        with self.queue.engine.connect() as connection:  # after that: a worker signs before it claims
            signs = dict(connection.execute(sa.select(workers.c.id, workers.c.heartbeat)).all())
        alive = {name for name, heartbeat in signs.items() if heartbeat >= time.time() - ALIVE} | {self.name}
        lost = {one.workflow_id for one in claimed if one.executor_id not in alive}
        not_started = {one.workflow_id for one in claimed if one.executor_id == self.name} - self._at_work
        self.queue.client.resume_workflows(sorted(lost | not_started & self._not_started), queue_name=QUEUE)
        self._not_started = not_started
        for name in signs.keys() - alive:
            self.records.sign_off(name)


@contextlib.contextmanager
def only_worker(config: ServingConfig, name: str) -> Iterator[None]:
    """Be the one worker of this name on this machine while the block lasts.

    Raises:
        UserError: there is one already.
    """
    with exclusive(config.folder / f".{name}.lock", f"a worker {name!r} is at work in {config.home} already"):
        yield


def memory_used() -> str:
    """What this process has needed at most, and holds of a GPU."""
    used = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB at most"
    if torch.cuda.is_available():
        used += f", {torch.cuda.memory_reserved() / 2**20:,.0f} MiB of the GPU"
    return used
