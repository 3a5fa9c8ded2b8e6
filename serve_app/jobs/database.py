"""The database: SQLite or PostgreSQL, brought up to date at the start, asked in threads of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import alembic.command
import alembic.config
from alembic.util import CommandError
from sqlalchemy import Double, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from deployments.observability.log import FAULT
from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection

logger = logging.getLogger("ray.serve")

THREADS = 4
BUSY_S = 30
"""How long one process waits while another one writes to SQLite's file."""
ONE_AT_A_TIME = 5_494_110_027
"""PostgreSQL's name for what `Database.one_at_a_time` holds: any number that nothing else uses."""

Result = TypeVar("Result")


class now(FunctionElement[float]):  # noqa: N801 - a function of SQL, named as such
    """Seconds since 1970 by the database's clock, which is one for all who share it."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(*_: object, **__: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(*_: object, **__: object) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


class Database:
    """What jobs are kept in. Several processes may use one at a time.

    Args:
        url: SQLAlchemy's, of SQLite (`sqlite:///PATH`) or PostgreSQL (`postgresql://…`). What it leaves out,
            the password say, PostgreSQL's client takes from the environment (`PGPASSWORD`, …).

    Raises:
        ValueError: the database cannot be used.
    """

    def __init__(self, url: str) -> None:
        where = make_url(url)
        self._is_sqlite = where.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self._is_sqlite:
            Path(where.database or "").parent.mkdir(parents=True, exist_ok=True)
            options = {"connect_args": {"timeout": BUSY_S}}
        else:
            where = where.set(drivername="postgresql+psycopg")
        self._engine = create_engine(where, pool_size=THREADS, **options)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._reading = self._engine.execution_options(only_reads=True)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        # SQLite has its writers look again and again whether it is their turn.
        self._writing = threading.Lock() if self._is_sqlite else nullcontext()
        try:
            self._migrate()
        except (CommandError, DBAPIError) as error:
            reason = str(error).partition("\n")[0]
            shown = where.render_as_string(hide_password=True)
            raise ValueError(f"database.url: {shown} cannot be used: {reason}") from None

    def _migrate(self) -> None:
        """Make the tables, or change them into what this version of the server needs."""
        config = alembic.config.Config()
        config.set_main_option("script_location", "serve_app.jobs:migrations")
        config.set_main_option("path_separator", "os")
        with self._transaction() as connection:
            self.one_at_a_time(connection)
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def one_at_a_time(self, connection: Connection) -> None:
        """Let no other transaction pass this point until this one has ended. SQLite's writers never do."""
        if not self._is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})"))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._writing, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        with self._reading.begin() as connection:
            yield connection

    def close(self) -> None:
        """Leave it; nothing is asked of it any more."""
        self._threads.shutdown()
        self._engine.dispose()

    async def write(self, call: Callable[[Connection], Result]) -> Result:
        """Run `call` in a thread and in a transaction, which takes effect as a whole or not at all.

        Raises:
            RequestError: 503, the database cannot be reached.
        """
        return await self._run(call, self._transaction)

    async def read(self, call: Callable[[Connection], Result]) -> Result:
        """Likewise, for what changes nothing and waits for no writer."""
        return await self._run(call, self._snapshot)

    async def _run(self, call: Callable[[Connection], Result], connected: Callable[[], Any]) -> Result:
        def run() -> Result:
            with connected() as connection:
                result: Result = call(connection)
                return result

        running = asyncio.get_running_loop().run_in_executor(self._threads, run)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The thread goes on. Whoever stopped this is not to go on before it has taken effect.
            await asyncio.wait([running])
            raise
        except DBAPIError as error:
            # Its text holds the statement and what was to be stored, prompts among it.
            problem = type(error.orig).__name__
            logger.error("the database failed: %s", problem, extra=FAULT)  # noqa: TRY400
            raise RequestError(
                "The database of jobs cannot be used right now; try again in a moment.",
                code="database_unavailable",
                status=503,
                headers={"Retry-After": "5"},
            ) from None


def _prepare_sqlite(connection: DBAPIConnection, _: object) -> None:
    connection.isolation_level = None  # else Python begins transactions by itself, and late
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that read before it writes may find that it may not; so it takes the lock at once."""
    reads = connection.get_execution_options().get("only_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
