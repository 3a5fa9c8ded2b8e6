"""The database: SQLite or PostgreSQL. It is migrated at the start, and used from threads of its own."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import alembic.command
import alembic.config
from alembic.util import CommandError
from sqlalchemy import Double, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement

from deployments.observability.log import FAULT
from serve_app.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL, Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection

logger = logging.getLogger("ray.serve")

THREADS = 4
BUSY_S = 30
"""Seconds that a process waits while another one writes to SQLite's file."""
LOCKED_RETRY_S = 0.05
HELD_S = 0.5
"""Seconds after which a locked file counts as in use. `holder` locks it for a moment."""
ADVISORY_LOCK = 5_494_110_027
"""Number of the PostgreSQL lock of `Database.one_at_a_time`: any number that nothing else uses."""
MIGRATIONS = Path(__file__).parent / "migrations"
STEPS = {"versions": "alembic_version", "additions": "alembic_additions"}
"""Folders of the migrations, in their order, and the tables that count their steps."""

Result = TypeVar("Result")


class now(FunctionElement[float]):  # noqa: N801 - named as functions of SQL are
    """Seconds since 1970 by the database's clock, which all its servers share."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(*_: object, **__: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(*_: object, **__: object) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


class Database:
    """The database of jobs. Several processes may use it at the same time.

    Args:
        url: SQLAlchemy's URL of SQLite (`sqlite:///PATH`; `~` is the home folder) or PostgreSQL
            (`postgresql://…`). PostgreSQL's client takes missing parts, such as the password, from the
            environment (`PGPASSWORD`, …).
        server: name of the server that uses it, which all its processes have. SQLite is for one server at a
            time: another one would run its jobs, and delete them.

    Raises:
        ValueError: the database cannot be used.
    """

    def __init__(self, url: str, server: str = "") -> None:
        where = resolved(url)
        self._is_sqlite = where.get_backend_name() == "sqlite"
        self._lock_file: IO[str] | None = None
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self._is_sqlite:
            path = Path(where.database or "")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _taken(_lock_of(path), server)
            options = {"connect_args": {"timeout": BUSY_S}}
        # The text of an error would hold the values of the statement, prompts among them.
        self._engine = create_engine(where, pool_size=2 * THREADS, hide_parameters=True, **options)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._reading = self._engine.execution_options(only_reads=True)
        # SQLite's writers poll for their turn. Within this process one thread spares that.
        self._writers = ThreadPoolExecutor(1 if self._is_sqlite else THREADS, "database-write")
        self._readers = ThreadPoolExecutor(THREADS, "database-read")
        try:
            self._migrate()
        except (CommandError, DBAPIError) as error:
            self.close()
            reason = str(error).partition("\n")[0]
            shown = where.render_as_string(hide_password=True)
            raise ValueError(f"database.url: {shown} cannot be used: {reason}") from None

    def _migrate(self) -> None:
        """Creates the tables, or migrates them to this version of the server."""
        with self._engine.begin() as connection:
            self._lock(connection)
            for folder, version_table in STEPS.items():
                config = alembic.config.Config()
                config.set_main_option("script_location", "serve_app.jobs:migrations")
                config.set_main_option("version_locations", str(MIGRATIONS / folder))
                config.set_main_option("path_separator", "os")
                config.attributes.update(connection=connection, version_table=version_table)
                alembic.command.upgrade(config, "head")

    def one_at_a_time(self, session: Session) -> None:
        """Lets one transaction at a time past this point; the next one waits until it has ended.

        Writers of SQLite run one at a time anyway.
        """
        self._lock(session.connection())

    def _lock(self, connection: Connection) -> None:
        if not self._is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))

    def close(self) -> None:
        """Closes all connections."""
        self._writers.shutdown()
        self._readers.shutdown()
        self._engine.dispose()
        if self._lock_file:
            self._lock_file.close()

    async def write(self, call: Callable[[Session], Result]) -> Result:
        """Runs `call` in a thread, in a transaction that takes effect as a whole or not at all.

        Raises:
            Unavailable: the database cannot be reached.
        """
        return await self._run(call, self._engine, self._writers)

    async def read(self, call: Callable[[Session], Result]) -> Result:
        """Runs `call`, which changes nothing, in a thread. It waits for no writer.

        SQLite shows all its queries the same state; PostgreSQL shows each one what is committed by then.

        Raises:
            Unavailable: the database cannot be reached.
        """
        return await self._run(call, self._reading, self._readers)

    async def _run(
        self, call: Callable[[Session], Result], engine: Engine, threads: ThreadPoolExecutor
    ) -> Result:
        def run() -> Result:
            # What was loaded stays readable when the transaction has ended.
            with engine.begin() as connection, Session(connection, expire_on_commit=False) as session:
                result = call(session)
                session.flush()
                return result

        running = asyncio.get_running_loop().run_in_executor(threads, run)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread goes on. The caller may go on only when the transaction has taken effect.
            await asyncio.wait([running])  # unlike `await running`, a second cancellation does not cancel it
            running.exception()  # asyncio would log an error that nobody has read
            raise
        except DBAPIError as error:
            # Its text holds the statement and its values, prompts among them.
            problem = type(error.orig).__name__
            logger.error("the database failed: %s", problem, extra=FAULT)  # noqa: TRY400
            raise Unavailable(
                "The database of jobs cannot be reached; try again in a moment.",
                code="database_unavailable",
                retry_after_s=5,
            ) from None


def resolved(url: str) -> URL:
    """Returns a database's URL with the driver that is used, and without `~`.

    Raises:
        ValueError: it is no such URL.
    """
    try:
        where = make_url(url)
    except (ArgumentError, ValueError):  # their texts may hold the password
        raise ValueError(
            "database.url is not a URL; use sqlite:///PATH or postgresql://USER@HOST/NAME"
        ) from None
    if where.get_backend_name() == "sqlite":
        return where.set(database=str(Path(where.database or "").expanduser()))
    return where.set(drivername="postgresql+psycopg")


def holder(path: Path) -> str | None:
    """Returns the server that has an SQLite file; None if no server has it.

    This holds the lock for a moment, if no server does.

    Raises:
        OSError: the lock file cannot be read.
    """
    try:
        with _lock_of(path).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read()
    except FileNotFoundError:
        pass  # no server has had it yet
    return None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _taken(path: Path, server: str) -> IO[str]:
    """Returns the lock file of an SQLite database, which all processes of one server hold together.

    The kernel gives the lock back when they end, however they end.

    Raises:
        ValueError: another server holds it.
    """
    file = path.open("a+")
    deadline = time.monotonic() + HELD_S
    while (holder := _held(file, server)) != server and time.monotonic() < deadline:
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(LOCKED_RETRY_S)
    if holder != server:
        file.close()
        raise ValueError(
            f"database.url: {path.with_suffix('')} is in use by another server: {holder}. Stop that server, "
            "or give this one another database.url; servers that share jobs need PostgreSQL."
        )
    return file


def _held(file: IO[str], server: str) -> str:
    """Takes the lock of a file for a server if it is free, and shares it otherwise; returns who has it."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(server)
        file.flush()
    fcntl.flock(file, fcntl.LOCK_SH)
    file.seek(0)
    return file.read()


def _prepare_sqlite(connection: DBAPIConnection, _: object) -> None:
    connection.isolation_level = None  # otherwise Python begins transactions by itself, and late
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:  # SQLite does not wait where another process changes the mode too
            if time.monotonic() > deadline:
                raise
            time.sleep(LOCKED_RETRY_S)
    connection.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut


def _begin_sqlite(connection: Connection) -> None:
    """Begins a transaction. A writer takes the lock at once, since one that has read may not get it later."""
    reads = connection.get_execution_options().get("only_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
