"""Jobs whose stored records cannot be read: they fail, and all other jobs continue."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from serve_app.jobs.database import Database
from serve_app.jobs.records import UnreadableRecord
from serve_app.jobs.store import JobStore
from tests.unit.serve_app.jobs.server import Make
from tests.unit.serve_app.jobs.stored import IMAGE, MODELS, OWNER, Open, claimed, new_job, no_news, submitted

NO_PROMPT = {"negative_prompt": "a secret", "model": "m", "n": 1}
ROWS = sa.table("jobs", sa.column("id"), sa.column("state"), sa.column("request", sa.JSON))
"""Table of jobs without typed records."""


class Stored:
    """A job store, and what its table contains."""

    def __init__(self, database: Database, ttl_s: float = 100) -> None:
        self.database = database
        self.jobs = JobStore(database, max_jobs=9, ttl_s=ttl_s)

    async def break_request(self, job_id: str, request: dict[str, Any] | None = None) -> None:
        """Replaces the request of a job by one without a prompt."""
        broken = sa.update(ROWS).where(ROWS.c.id == job_id).values(request=request or NO_PROMPT)
        await self.database.write(lambda session: session.execute(broken))

    async def states(self) -> dict[str, str]:
        """Returns the states of all jobs, by their ids."""
        query = sa.select(ROWS.c.id, ROWS.c.state)
        return await self.database.read(lambda session: {row.id: row.state for row in session.execute(query)})


@pytest.fixture
def stored(database_url: str, open_database: Open) -> Stored:
    return Stored(open_database(database_url))


def test_a_runner_fails_an_unreadable_job_and_runs_the_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = make()
        stored = Stored(server.database)
        first, second, third = [await server.submit() for _ in range(3)]
        for broken in (first, second):
            await stored.break_request(broken.id)
        server.stages.may_continue()
        async with server.runner.run_in_background():
            assert (await server.ended(third.id)).state == "succeeded"
        expected = {first.id: "failed", second.id: "failed", third.id: "succeeded"}
        assert await stored.states() == expected
        await stored.break_request(first.id, new_job().request.model_dump(mode="json"))
        failed = await server.job(first.id)
        assert failed.error
        assert (failed.error.code, failed.error.as_error().retryable) == ("unreadable_job", False)
        assert f"job {first.id} cannot be read and fails: prompt: Field required" in caplog.text
        for words in ("secret", "a boat"):
            assert words not in caplog.text

    asyncio.run(main())


def test_reading_an_unreadable_job_is_an_error(stored: Stored) -> None:
    async def main() -> None:
        job = await submitted(stored.jobs)
        await stored.break_request(job.id)
        for call in (stored.jobs.get, stored.jobs.cancel, stored.jobs.purge):
            with pytest.raises(UnreadableRecord) as caught:
                await call(OWNER, job.id)
            assert caught.value.code == "unreadable_job"
            assert "secret" not in f"{caught.value} {caught.value.problem}"

    asyncio.run(main())


def test_a_list_leaves_unreadable_jobs_out(stored: Stored) -> None:
    async def main() -> None:
        ids = [(await submitted(stored.jobs)).id for _ in range(5)]
        await stored.break_request(ids[1])
        await stored.break_request(ids[4])
        page = await stored.jobs.page(OWNER, limit=2)
        assert [job.id for job in page] == [ids[3], ids[2]]
        assert [job.id for job in await stored.jobs.page(OWNER, limit=2, after=ids[2])] == [ids[0]]

    asyncio.run(main())


def test_late_jobs_end_beside_an_unreadable_one(stored: Stored) -> None:
    async def main() -> None:
        jobs = [await submitted(stored.jobs, start_within_s=1e-6) for _ in range(3)]
        await stored.break_request(jobs[1].id)
        assert {job.id for job in await stored.jobs.end_overdue(MODELS)} == {jobs[0].id, jobs[2].id}
        assert await stored.states() == {job.id: "failed" for job in jobs}

    asyncio.run(main())


def test_an_unreadable_job_expires_with_the_others(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        stored = Stored(open_database(database_url), ttl_s=-1)
        jobs = [await submitted(stored.jobs, sources=["a.png"]) for _ in range(3)]
        for job in jobs:
            await stored.jobs.cancel(OWNER, job.id)
        await stored.break_request(jobs[0].id)
        assert {job.id for job in await stored.jobs.delete_expired()} == {jobs[1].id, jobs[2].id}
        assert await stored.states() == {}

    asyncio.run(main())


def test_an_unreadable_job_does_not_delay_the_webhooks_of_others(
    stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        url = "https://example.com/hook?token=t"
        broken, other = [await submitted(stored.jobs, webhook_url=url) for _ in range(2)]
        await stored.jobs.cancel(OWNER, broken.id)
        await stored.jobs.cancel(OWNER, other.id)
        await stored.break_request(broken.id)
        due = await stored.jobs.next_webhook(within_s=60, max_tries=3)
        assert due
        assert due.id == other.id
        assert await stored.jobs.next_webhook(within_s=-1, max_tries=3) is None
        assert "a webhook is given up" in caplog.text
        for words in ("secret", "token"):
            assert words not in caplog.text

    asyncio.run(main())


def test_an_image_without_a_name_makes_its_job_unreadable(stored: Stored) -> None:
    async def main() -> None:
        await submitted(stored.jobs)
        job = await claimed(stored.jobs)
        assert await stored.jobs.finish("w", no_news(job), "succeeded", images=[IMAGE])
        table = sa.table("jobs", sa.column("id"), sa.column("images", sa.JSON))
        broken = sa.update(table).values(images=[{"bytes": 1}])
        await stored.database.write(lambda session: session.execute(broken))
        with pytest.raises(UnreadableRecord):
            await stored.jobs.get(OWNER, job.id)
        assert await stored.jobs.claim("w", MODELS) is None

    asyncio.run(main())
