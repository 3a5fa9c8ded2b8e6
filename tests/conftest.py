"""Fixtures and marks of all tests. Tests that need a missing program are skipped, but never in CI."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

from serve_app.jobs.database import Database
from tests import postgresql as postgresql_server
from tests.receiver import Receiver

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs g++ (Debian: apt-get install g++)"
)
needs_node = pytest.mark.skipif(
    not shutil.which("node") or not (Path(__file__).parent / "http/js/node_modules").exists(),
    reason="Debian's nodejs and npm are missing",
)
needs_jq = pytest.mark.skipif(not shutil.which("jq"), reason="jq is missing (Debian: apt-get install jq)")
needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx"), reason="nginx is missing (Debian: apt-get install nginx)"
)
needs_caddy = pytest.mark.skipif(
    not shutil.which("caddy"), reason="caddy is missing (Debian: apt-get install caddy)"
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run with a skipped test if FAIL_ON_SKIP is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FAIL_ON_SKIP") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("a test was skipped, and FAIL_ON_SKIP is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Runs a PostgreSQL for the tests. The fixture makes a new database and returns its URL."""
    try:
        with postgresql_server.running() as server:
            yield server.database
    except postgresql_server.MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, Any]]:
    """Options for a bucket on moto's server."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            environment.setenv(f"AWS_{name}", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer(port=0)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="files")
        yield {"endpoint_url": endpoint}
        server.stop()


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
