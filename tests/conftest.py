"""Fixtures and marks of all tests. Tests that need a missing program are skipped, but never in CI."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from serve_app.jobs.database import Database
from tests.receiver import Receiver

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs g++ (Debian: apt-get install g++)"
)
needs_node = pytest.mark.skipif(
    not shutil.which("node") or not (Path(__file__).parent / "http/js/node_modules").exists(),
    reason="Debian's nodejs and npm are missing",
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run with a skipped test if FAIL_ON_SKIP is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FAIL_ON_SKIP") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("a test was skipped, and FAIL_ON_SKIP is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _postgresql(program: str) -> str:
    """Returns the path of a program of PostgreSQL. Debian may have several versions side by side."""
    found = [shutil.which(program), *map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))]
    if path := next(filter(None, found), None):
        return path
    pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Runs a PostgreSQL for the tests. The fixture makes a new database and returns its URL."""
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        subprocess.run(
            [_postgresql("initdb"), "-D", data, "-U", "tests", "-A", "trust", "--no-sync"],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        settings = (
            "fsync=off",
            "listen_addresses=127.0.0.1",
            f"port={port}",
            f"unix_socket_directories={folder}",
        )
        log = Path(folder, "log")
        with (
            log.open("w") as output,
            subprocess.Popen(
                [_postgresql("postgres"), "-D", data, *(f"-c{setting}" for setting in settings)],
                user=user,
                cwd=folder,
                stderr=output,
            ) as server,
        ):
            address = f"postgresql://tests@127.0.0.1:{port}"
            try:
                while not _answers(f"{address}/postgres"):
                    assert server.poll() is None, log.read_text()

                def make() -> str:
                    name = f"d{secrets.token_hex(4)}"
                    with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
                        connection.execute(f"CREATE DATABASE {name}".encode())
                    return f"{address}/{name}"

                yield make
            finally:
                server.send_signal(signal.SIGINT)  # does not wait for clients
                server.wait(30)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database: SQLite, then PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    make: Callable[[], str] = request.getfixturevalue("postgresql")
    return make()


@pytest.fixture
def open_database() -> Iterator[Callable[[str], Database]]:
    """Opens databases by their URLs. All are closed after the test."""
    opened: list[Database] = []

    def open_it(url: str) -> Database:
        opened.append(Database(url))
        return opened[-1]

    yield open_it
    for database in opened:
        database.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with receiver.receiving():
        yield receiver


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Method and path of every request that httpx sends. A request that is retried is there twice."""
    requests: list[str] = []
    send = httpx.HTTPTransport.handle_request

    def noted(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        requests.append(f"{request.method} {request.url.path}")
        return send(transport, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", noted)
    return requests
