"""The database, SQLite or PostgreSQL: concurrent starts, cancelled calls, and URLs that cannot be used."""

import asyncio
import multiprocessing
import threading
from pathlib import Path

import pytest

from serve_app.jobs.database import Database
from serve_app.jobs.store import JobStore
from tests.unit.serve_app.jobs.stored import OWNER, Open, submitted


def test_processes_that_start_together_make_the_tables_once(database_url: str, open_database: Open) -> None:
    context = multiprocessing.get_context("spawn")
    starting = [context.Process(target=Database, args=(database_url,)) for _ in range(4)]
    for process in starting:
        process.start()
    for process in starting:
        process.join(60)
    assert [process.exitcode for process in starting] == [0] * 4

    async def main() -> None:
        job = await submitted(JobStore(open_database(database_url), max_jobs=5, ttl_s=60))
        assert await JobStore(open_database(database_url), max_jobs=5, ttl_s=60).get(OWNER, job.id) == job

    asyncio.run(main())


def test_a_cancelled_write_ends_only_when_it_has_taken_effect(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

        def slow(_: object) -> None:
            begun.set()
            assert may_end.wait(20)
            ended.set()

        writing = asyncio.create_task(open_database(database_url).write(slow))
        await asyncio.to_thread(begun.wait, 20)
        writing.cancel()
        await asyncio.wait([writing], timeout=0.1)
        assert not writing.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert ended.is_set()

    asyncio.run(main())


def test_a_path_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Database("sqlite:///~/new/jobs.db").close()
    assert (tmp_path / "new" / "jobs.db").exists()


def test_an_unusable_database_is_named_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database")
    with pytest.raises(ValueError, match="not a database"):
        Database(f"sqlite:///{tmp_path}/file")
    with pytest.raises(ValueError, match=r"u:\*\*\*@127\.0\.0\.1:1/d cannot be used") as caught:
        Database("postgresql://u:secret@127.0.0.1:1/d")
    assert "secret" not in str(caught.value)
