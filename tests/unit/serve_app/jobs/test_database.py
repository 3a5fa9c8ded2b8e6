"""The database, SQLite or PostgreSQL: concurrent starts, cancelled calls, and URLs that cannot be used."""

import asyncio
import fcntl
import gc
import multiprocessing
import threading
from pathlib import Path

import pytest
from sqlalchemy import literal, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from serve_app.jobs.database import THREADS, Database
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job
from tests.unit.serve_app.jobs.stored import OWNER, Open, submitted

JOB_ID = "0190163d-8694-739b-aea5-966c26f8ad91"


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


def test_a_read_waits_for_no_writers(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        database, may_end = open_database(database_url), threading.Event()
        writing = [
            asyncio.create_task(database.write(lambda _: may_end.wait(20))) for _ in range(2 * THREADS)
        ]
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert await database.read(lambda session: session.scalar(select(literal(1)))) == 1
        may_end.set()
        assert all(await asyncio.gather(*writing))

    asyncio.run(main())


def test_an_error_holds_no_values_even_if_nobody_waits_for_it(
    database_url: str, open_database: Open, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []

    def fail(session: Session) -> None:
        assert may_fail.wait(20)
        try:
            session.execute(text("INSERT INTO nothing VALUES (:prompt)"), {"prompt": "a secret boat"})
        except DBAPIError as error:
            texts.append(str(error))
            raise

    async def main() -> None:
        writing = asyncio.create_task(open_database(database_url).write(fail))
        await asyncio.sleep(0)
        writing.cancel()
        may_fail.set()
        with pytest.raises(asyncio.CancelledError):
            await writing

    may_fail = threading.Event()
    asyncio.run(main())
    gc.collect()
    assert "INSERT INTO nothing" in texts[0]
    assert "a secret boat" not in texts[0]
    assert "never retrieved" not in caplog.text


def test_a_path_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Database("sqlite:///~/new/jobs.db").close()
    assert (tmp_path / "new" / "jobs.db").exists()


def test_a_file_of_sqlite_is_for_one_server_at_a_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    first = Database(url, "demo")
    Database(url, "demo").close()  # another process of the same server
    with pytest.raises(
        ValueError, match=r"jobs\.db is in use by another server: demo\. Stop that server, or"
    ):
        Database(url, "tiny")
    first.close()
    Database(url, "tiny").close()


def test_a_look_at_the_lock_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    """`doctor` holds the lock for a moment, in which the file still names the server before."""
    lock = tmp_path / "jobs.db.lock"
    lock.write_text("the server before")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        Database(f"sqlite:///{tmp_path}/jobs.db", "demo").close()
        release.join()
    assert lock.read_text() == "demo"


def test_an_older_server_can_go_on_using_the_database(database_url: str, open_database: Open) -> None:
    """Version 0.1.0 knows one step of `alembic_version`, and names the columns that it fills."""

    def as_version_0_1_0(session: Session) -> str:
        table = Job.metadata.tables["jobs"]
        old = [column for column in table.columns if column.name not in ("identity", "work", "turn")]
        new = {"seq": table.c.seq + 1, "id": literal(JOB_ID)}
        copied = select(*(new.get(column.name, column) for column in old))
        session.execute(table.insert().from_select(old, copied, include_defaults=False))
        return session.scalar(text("SELECT version_num FROM alembic_version")) or ""

    async def main() -> None:
        database = open_database(database_url)
        store = JobStore(database, max_jobs=5, ttl_s=60)
        await submitted(store)
        assert await database.write(as_version_0_1_0) == "0001"
        found = await store.get(OWNER, JOB_ID)
        assert (found.identity, found.turn) == (None, 0)

    asyncio.run(main())


def test_an_unusable_database_is_named_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database")
    with pytest.raises(ValueError, match="not a database"):
        Database(f"sqlite:///{tmp_path}/file")
    with pytest.raises(ValueError, match=r"u:\*\*\*@127\.0\.0\.1:1/d cannot be used") as caught:
        Database("postgresql://u:secret@127.0.0.1:1/d")
    assert "secret" not in str(caught.value)
