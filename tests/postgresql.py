"""A PostgreSQL server for tests, which can be away for a while."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.polling import until

USER = "postgres" if os.geteuid() == 0 else None
"""The user that runs it. It does not run as root."""


class MissingError(Exception):
    """PostgreSQL is not installed."""


def program(name: str) -> str:
    """Returns the path of a program of PostgreSQL. Debian may have several versions side by side.

    Raises:
        MissingError: there is none.
    """
    found = [shutil.which(name), *map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]
    if path := next(filter(None, found), None):
        return path
    raise MissingError("needs PostgreSQL (Debian: apt-get install postgresql)")


class PostgreSQL:
    """A server on 127.0.0.1 with its data in a folder. `start` and `stop` may alternate."""

    def __init__(self, folder: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._folder = folder
        self._address = f"postgresql://tests@127.0.0.1:{port}"
        settings = ["fsync=off", "listen_addresses=127.0.0.1", f"port={port}"]
        settings += [f"unix_socket_directories={folder}"]
        data = f"{folder}/data"
        self._command = [program("postgres"), "-D", data, *(f"-c{setting}" for setting in settings)]
        self._server: subprocess.Popen[bytes] | None = None
        if USER:
            shutil.chown(folder, USER)
        subprocess.run(
            [program("initdb"), "-D", data, "-U", "tests", "-A", "trust", "--no-sync"],
            user=USER,
            cwd=folder,
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        """Starts the server; returns when it answers."""
        log = Path(self._folder, "log")
        with log.open("a") as output:
            server = subprocess.Popen(self._command, user=USER, cwd=self._folder, stderr=output)
        self._server = server

        def answers() -> bool:
            assert server.poll() is None, log.read_text()
            try:
                psycopg.connect(f"{self._address}/postgres", connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers)

    def stop(self) -> None:
        """Stops the server, without waiting for its clients."""
        if self._server:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def database(self) -> str:
        """Makes a new database; returns its URL."""
        name = f"d{secrets.token_hex(4)}"
        with psycopg.connect(f"{self._address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"{self._address}/{name}"


@contextmanager
def running() -> Iterator[PostgreSQL]:
    """Runs a server within the block."""
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        server = PostgreSQL(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
