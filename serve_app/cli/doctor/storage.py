"""Findings about the places of jobs and files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from serve_app.cli.doctor.findings import fault, fine, reason, sized
from serve_app.cli.doctor.machine import existing, free
from serve_app.files.store import file_system
from serve_app.home import at_home
from serve_app.jobs.database import holder, resolved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.cli.config_file import ServeApplication
    from serve_app.cli.doctor.findings import Finding

CONNECT_TIMEOUT_S = 4
SQLITE_BEGIN = b"SQLite format 3\x00"
"""https://www.sqlite.org/fileformat.html#magic_header_string"""
MIN_DATABASE_FREE = 10**9
"""Free bytes for the database, whose transactions take more while they run."""


def database(application: ServeApplication) -> Iterator[Finding]:
    """Yields whether the database of jobs can be used."""
    config = at_home(application.args, application.name, claims=False)
    where = resolved(config.database.url)
    if where.get_backend_name() == "sqlite":
        yield from _sqlite(Path(where.database or ""))
    else:
        yield from _postgresql(where)


def _sqlite(path: Path) -> Iterator[Finding]:
    if problem := _unwritable(path.parent):
        yield fault(f"database {path}: {problem}", f"make {path.parent} writable, or change database.url")
        return
    beside = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", ".lock")]
    files = [file for file in beside if file.exists()]
    for file in files:
        if not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
            yield fault(f"database {file} is not writable", "give the file to the user of the server")
            return
    if path.exists():
        with path.open("rb") as opened:
            begin = opened.read(len(SQLITE_BEGIN))
        if begin not in (b"", SQLITE_BEGIN):
            yield fault(f"database {path} is no SQLite file", "change database.url, or restore a backup")
            return
    state = "exists and is writable" if path.exists() else "does not exist yet, and can be made"
    room = free(path.parent)
    if room < MIN_DATABASE_FREE:
        yield fault(f"database {path} {state}, with {sized(room)} free on its disk", "delete files there")
    else:
        yield fine(f"database {path} {state}; {sized(room)} are free on its disk")
    if (server := holder(path)) is not None:
        yield fault(
            f"database {path} is in use by the server {server}",
            "stop that server before another one starts with it",
        )


def _postgresql(where: URL) -> Iterator[Finding]:
    shown = URL.create("postgresql", host=where.host, port=where.port, database=where.database)
    engine = create_engine(
        where,
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
    )
    try:
        with engine.begin() as connection:
            version = connection.execute(text("SHOW server_version")).scalar()
    except DBAPIError as error:
        yield fault(
            f"database {shown}: {reason(error.orig or error)}",
            "start PostgreSQL, or correct database.url and the variables PGHOST, PGUSER, PGPASSWORD, …",
        )
    else:
        yield fine(f"database {shown} answers: PostgreSQL {version}")


def files(application: ServeApplication) -> Iterator[Finding]:
    """Yields whether the file store can be used."""
    config = at_home(application.args, application.name, claims=False).storage
    fs, root = file_system(config)
    if not isinstance(fs, LocalFileSystem):
        try:
            if not fs.exists(root):  # nor is there, before the first file
                fs.find(root)  # raises if there is no such bucket
        except Exception as error:  # noqa: BLE001 - each store has its own kinds
            yield fault(
                f"files {config.url}: {reason(error)}",
                "correct storage.url, storage.options or the credentials in the environment",
            )
        else:
            yield fine(f"files {config.url}: the store answers")
        return
    if problem := _unwritable(Path(root)):
        yield fault(f"files {root}: {problem}", "make the folder writable, or change storage.url")
        return
    room = free(root)
    if room < config.min_free_bytes:
        yield fault(
            f"files {root}: {sized(room)} are free, and storage.min_free_bytes leaves "
            f"{sized(config.min_free_bytes)}",
            "delete files on that disk, or lower storage.min_free_bytes",
        )
    else:
        state = "is writable" if Path(root).exists() else "does not exist yet, and can be made"
        yield fine(f"files {root}: the folder {state}; {sized(room)} are free on its disk")


def _unwritable(folder: Path) -> str | None:
    """Returns why files cannot be written to a folder; None if they can.

    In a folder that exists, this writes a file and deletes it. One that does not is not made.
    """
    above = existing(folder)
    if not above.is_dir():
        return f"{above} is no folder"
    if above != folder:
        writable = os.access(above, os.W_OK | os.X_OK, effective_ids=True)
        return None if writable else f"it does not exist, and {above} is not writable"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None
