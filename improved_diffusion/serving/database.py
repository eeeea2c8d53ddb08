"""The tables of a server, beside those of DBOS in one database, so that a job and its place in the queue are one
transaction."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from dbos import DBOS
from sqlalchemy import JSON, BigInteger, Column, Float, Integer, Table, Text

from improved_diffusion.errors import UserError
from improved_diffusion.serving.config import ServingConfig

metadata = sa.MetaData()

jobs = Table(
    "serving_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("number", Integer, nullable=False),  # in the order of acceptance
    Column("user", Text, nullable=False, index=True),
    Column("request", JSON, nullable=False),
    Column("origin", JSON, nullable=False),  # where the answer goes, as the client means it
    Column("cost", Float, nullable=False),  # seconds of the device that it is expected to take
    Column("start", Float, nullable=False),  # virtual, in seconds
    Column("state", Text, nullable=False, index=True),
    Column("attempts", Integer, nullable=False, default=0),  # times that drawing was begun
    Column("progress", Float, nullable=False, default=0.0),
    Column("created", Float, nullable=False),  # this and what follows: seconds since 1970
    Column("started", Float),
    Column("finished", Float),
    Column("files", JSON, nullable=False, default=list),  # of the results, relative to their folder
    Column("bytes", Integer, nullable=False, default=0),
    Column("error", Text),
)
uploads = Table(
    "serving_uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user", Text, nullable=False, index=True),
    Column("bytes", Integer, nullable=False),
    Column("created", Float, nullable=False),
)
deliveries = Table(  # the ledger
    "serving_deliveries",
    metadata,
    Column("job", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("at", Float, nullable=False),
)
preferences = Table(
    "serving_preferences",
    metadata,
    Column("user", Text, primary_key=True),
    Column("style", Text),
)
packs = Table(  # of stickers on Telegram; a row stays when its job expires, for the sticker stays in the pack
    "serving_packs",
    metadata,
    Column("job", Text, primary_key=True),
    Column("user", Text, nullable=False, index=True),
    Column("number", Integer, nullable=False),  # of the user's pack
    Column("before", JSON, nullable=False),  # stickers that were in the pack before
    Column("sticker", Text),  # Telegram's name of it, when it is in the pack
)
updates = Table(  # of Telegram, that it no longer keeps and that have not been dealt with
    "serving_updates",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("user", Text, nullable=False, index=True),
    Column("content", JSON, nullable=False),
)
workers = Table(
    "serving_workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("heartbeat", Float, nullable=False),
    Column("report", JSON, nullable=False),  # device, memory, cache, address
)
facts = Table(  # what the worker tells the clients: what can be asked for, and how long it takes
    "serving_facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", JSON, nullable=False),
)
counter = Table(  # one row
    "serving_counter",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("jobs", Integer, nullable=False),  # accepted so far
    Column("virtual", Float, nullable=False),  # time: the latest start of those that were begun
)


def open_database(config: ServingConfig) -> sa.Engine:
    """Connections to the database of a server. Tables that an older version did not make are made.

    Raises:
        UserError: `create_database` has not been here, or the database cannot be reached, or is damaged.
    """
    if config.database is None and not Path(config.folder / "queue.sqlite").is_file():
        raise UserError(f"there is no queue in {config.home}: python serve.py init --home {config.home}")
    engine = _engine(config)
    with _usable(engine):
        metadata.create_all(engine)
    return engine


def create_database(config: ServingConfig) -> None:
    """Make the tables, DBOS's and ours, where they are not there.

    Raises:
        UserError: the database cannot be reached, or is damaged.
    """
    quieten_dbos()
    engine = _engine(config)
    with _usable(engine):
        if config.database is None:
            with engine.connect() as connection:  # kept in the file; writers no longer stop readers
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        DBOS.migrate(config.database_url)
        metadata.create_all(engine)
        with engine.begin() as connection:
            if connection.scalar(sa.select(counter.c.jobs)) is None:
                connection.execute(counter.insert().values(id=1, jobs=0, virtual=0.0))
    engine.dispose()


@contextlib.contextmanager
def _usable(engine: sa.Engine) -> Iterator[None]:
    """Say in one line, as a UserError, what is the matter with a database; its connections are closed then."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        engine.dispose()
        raise UserError(f"the database {engine.url!r} cannot be used: {str(error.orig).splitlines()[0]}") from error


def hold_queue(connection: sa.Connection) -> None:
    """Nothing is queued until the end of the transaction, of which this is to be the first statement."""
    connection.execute(counter.update().values(jobs=counter.c.jobs))


def take_number(connection: sa.Connection) -> int:
    """The next job's. To be the first statement of a transaction: until its end no other one comes past this."""
    connection.execute(counter.update().values(jobs=counter.c.jobs + 1))
    return connection.scalar(sa.select(counter.c.jobs))


def put(connection: sa.Connection, table: Table, key: str, **values: object) -> None:
    """Insert or replace the row of `table` whose primary key is `key`."""
    (primary,) = table.primary_key.columns
    if connection.execute(table.update().where(primary == key).values(values)).rowcount == 0:
        connection.execute(table.insert().values({primary.name: key, **values}))


def quieten_dbos() -> None:
    """Let DBOS speak of what goes wrong only."""
    logging.getLogger("dbos").setLevel(logging.ERROR)


def _engine(config: ServingConfig) -> sa.Engine:
    if config.database is not None:
        return sa.create_engine(config.database, pool_size=10, pool_pre_ping=True)
    engine = sa.create_engine(config.database_url)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: object, _: object) -> None:  # as DBOS does with its own connections
        connection.isolation_level = "IMMEDIATE"
        for pragma in ("busy_timeout=30000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    return engine
