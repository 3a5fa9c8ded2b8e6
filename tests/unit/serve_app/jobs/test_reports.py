"""Reports for the operator, on SQLite and on PostgreSQL."""

import asyncio
import time

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from serve_app.jobs import reports
from serve_app.jobs.database import Database
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job, Owner
from serve_app.observability.recent import DAY_S, DAYS, Work, day_of
from tests.unit.serve_app.jobs.stored import IMAGE, MODELS, OWNER, Open, claimed, new_job, no_news, submitted


@pytest.fixture
def database(database_url: str, open_database: Open) -> Database:
    return open_database(database_url)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, max_jobs=9, ttl_s=10 * DAYS * DAY_S)


def test_unfinished_jobs_of_all_owners_are_reported(database: Database, store: JobStore) -> None:
    async def main() -> None:
        owners = [Owner("a", "images"), Owner("", "fal"), Owner("b", "zai")]
        ids = [(await submitted(store, owner=owner)).id for owner in owners]
        await store.cancel(owners[0], ids[0])
        await claimed(store)
        assert [(job.id, job.state) for job in await reports.unfinished(database)] == [
            (ids[1], "running"),
            (ids[2], "queued"),
        ]

    asyncio.run(main())


def test_the_work_of_jobs_is_reported_by_day_and_key(
    database: Database, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()

    async def made(key_id: str, n: int, ended_days_ago: float) -> None:
        request = new_job().request.model_copy(update={"n": n})
        await submitted(store, owner=Owner(key_id, "images"), request=request, work=1.5 * n)
        job = await claimed(store, models=MODELS)
        assert await store.finish("w", no_news(job), "succeeded", images=[IMAGE] * n)

        def set_back(session: Session) -> None:
            ended_at = now - ended_days_ago * DAY_S
            session.execute(update(Job).where(Job.id == job.id).values(ended_at=ended_at))

        await database.write(set_back)

    async def main() -> None:
        await made("a", 1, 0)
        await made("a", 4, 0)
        await made("b", 2, 0)
        await made("a", 3, 2)
        await made("a", 1, DAYS + 1)
        await submitted(store)
        today, before = day_of(now), day_of(now - 2 * DAY_S)
        work = reports.WorkOfJobs(database)
        assert await work.by_day() == {
            (today, "a"): Work(2, 5, 7.5),
            (today, "b"): Work(1, 2, 3),
            (before, "a"): Work(1, 3, 4.5),
        }
        assert await store.finish("w", no_news(await claimed(store)), "succeeded", images=[IMAGE])
        assert (today, OWNER.key_id) not in await work.by_day(), "it was read a moment ago"
        monkeypatch.setattr(reports, "MAX_AGE_S", 0)
        assert (today, OWNER.key_id) in await work.by_day()

    asyncio.run(main())
