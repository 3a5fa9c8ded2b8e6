"""The job store on SQLite and on PostgreSQL: submission, reading, cancellation, expiry and webhooks."""

import asyncio
from typing import Any

import pytest

from serve_app.errors import Busy, Conflict, NotFound
from serve_app.jobs.queries import readable_jobs
from serve_app.jobs.records import StoredEncoding
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job, Owner, State
from tests.unit.serve_app.jobs.stored import (
    ANOTHER,
    BROKEN,
    IMAGE,
    MODELS,
    OWNER,
    Open,
    claimed,
    new_job,
    no_news,
    submitted,
)


def test_a_job_is_kept_as_submitted(store: JobStore) -> None:
    async def main() -> None:
        fields: dict[str, Any] = {
            "sources": ["a.png"],
            "encoding": StoredEncoding(format="webp"),
            "answer": {"x": [1, None]},
        }
        job = await submitted(store, **fields)
        again = await store.get(OWNER, job.id)
        assert again == job
        assert (again.state, again.position) == ("queued", 0)
        assert {name: getattr(again, name) for name in fields} == fields
        assert again.request == new_job().request

    asyncio.run(main())


@pytest.mark.parametrize("owner", [ANOTHER, Owner("k", "fal")])
def test_a_job_exists_for_its_owner_only(store: JobStore, owner: Owner) -> None:
    async def main() -> None:
        job = await submitted(store)
        with pytest.raises(NotFound, match="no such job"):
            await store.get(owner, job.id)

    asyncio.run(main())


@pytest.mark.parametrize("job_id", ["none", "\0"])
def test_an_invalid_id_names_no_job(store: JobStore, job_id: str) -> None:
    async def main() -> None:
        with pytest.raises(NotFound, match="no such job"):
            await store.get(OWNER, job_id)

    asyncio.run(main())


def test_jobs_beyond_the_limit_are_rejected_until_one_has_ended(store: JobStore) -> None:
    async def main() -> None:
        results = await asyncio.gather(*(store.submit(new_job()) for _ in range(9)), return_exceptions=True)
        rejected = [one for one in results if isinstance(one, Busy)]
        assert len(rejected) == 4
        assert rejected[0].retry_after_s
        job = await claimed(store)
        with pytest.raises(Busy):
            await store.check_room()
        assert await store.finish("w", no_news(job), "succeeded")
        await store.check_room()

    asyncio.run(main())


def test_requests_with_one_idempotency_key_make_one_job(store: JobStore) -> None:
    async def main() -> None:
        results = await asyncio.gather(*(store.submit(new_job(idempotency_key="i")) for _ in range(4)))
        assert len({job.id for job, _ in results}) == 1
        assert sum(is_new for _, is_new in results) == 1
        known = await store.known(new_job(idempotency_key="i"))
        assert known
        assert known.id == results[0][0].id
        with pytest.raises(Conflict):
            await store.submit(new_job(idempotency_key="i", fingerprint="g"))
        assert (await submitted(store, idempotency_key="i", owner=ANOTHER)).id != known.id
        assert await store.known(new_job(idempotency_key="j")) is None

    asyncio.run(main())


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        job, has_ended = await store.cancel(OWNER, job.id)
        assert (job.state, has_ended) == ("cancelled", True)
        job, has_ended = await store.cancel(OWNER, job.id)
        assert (job.state, has_ended) == ("cancelled", False), "it may be repeated"
        assert await store.claim("w", MODELS) is None
        with pytest.raises(NotFound):
            await store.cancel(ANOTHER, job.id)

    asyncio.run(main())


def test_a_running_job_is_cancelled_by_its_runner_and_cannot_end_otherwise(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        assert not await store.finish("w", no_news(job), "cancelled"), "its owner has not cancelled it"
        cancelling, has_ended = await store.cancel(OWNER, job.id)
        assert not has_ended
        assert (cancelling.state, cancelling.cancelling) == ("running", True)
        assert await store.renew("w", [job.id]) == set()
        assert not await store.finish("w", no_news(job), "succeeded", images=[IMAGE])
        assert await store.finish("w", no_news(job), "cancelled")
        assert (await store.get(OWNER, job.id)).state == "cancelled"

    asyncio.run(main())


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_an_ended_job_cannot_be_cancelled(store: JobStore, state: State) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        assert await store.finish("w", no_news(job), state, error=BROKEN)
        with pytest.raises(Conflict, match=f"has {state} already"):
            await store.cancel(OWNER, job.id)
        assert (await store.get(OWNER, job.id)).state == state

    asyncio.run(main())


def test_an_ended_job_is_purged_by_its_owner_and_no_other_job_is(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        with pytest.raises(Conflict, match="is queued; cancel it first"):
            await store.purge(OWNER, job.id)
        await claimed(store)
        with pytest.raises(Conflict, match="is running; cancel it first"):
            await store.purge(OWNER, job.id)
        assert await store.finish("w", no_news(job), "succeeded", images=[IMAGE])
        with pytest.raises(NotFound, match="no such job"):
            await store.purge(ANOTHER, job.id)
        assert (await store.purge(OWNER, job.id)).files == ["b.png"]
        with pytest.raises(NotFound, match="no such job"):
            await store.purge(OWNER, job.id)

    asyncio.run(main())


def test_a_job_that_has_not_begun_in_time_fails(store: JobStore) -> None:
    async def main() -> None:
        late = await submitted(store, start_within_s=1e-6)
        patient = await submitted(store, start_within_s=60)
        (ended,) = await store.end_overdue(MODELS)
        assert (ended.id, ended.state) == (late.id, "failed")
        assert ended.error
        assert ended.error.code == "start_timeout"
        assert (await claimed(store)).id == patient.id

    asyncio.run(main())


def test_a_late_job_is_not_begun_before_it_is_ended(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store, start_within_s=1e-6)
        assert await store.claim("w", MODELS) is None

    asyncio.run(main())


def test_old_jobs_expire(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        store = JobStore(open_database(database_url), max_jobs=5, ttl_s=60)
        hasty = JobStore(open_database(database_url), max_jobs=5, ttl_s=-1)
        await submitted(store)
        kept, old = await claimed(store), await submitted(store, sources=["a.png"])
        assert await store.finish("w", no_news(kept), "succeeded")
        await claimed(store)
        assert await hasty.finish("w", no_news(old), "succeeded", images=[IMAGE])
        waiting = await submitted(store)
        (expired,) = await store.delete_expired()
        assert (expired.id, expired.files) == (old.id, ["a.png", "b.png"])
        assert [job.id for job in await store.page(OWNER, limit=9)] == [waiting.id, kept.id]
        assert await store.delete_expired() == []

    asyncio.run(main())


def test_jobs_are_listed_by_page(store: JobStore) -> None:
    async def main() -> None:
        other_api = await submitted(store, owner=Owner("k", "fal"))
        await store.cancel(Owner("k", "fal"), other_api.id)
        ids = [(await submitted(store)).id for _ in range(4)]
        await submitted(store, owner=ANOTHER)
        await store.cancel(OWNER, ids[1])
        page = await store.page(OWNER, limit=3)
        assert [job.id for job in page] == ids[:0:-1]
        assert [job.id for job in await store.page(OWNER, limit=3, after=ids[1])] == ids[:1]
        assert [job.id for job in await store.page(OWNER, limit=9, state="cancelled")] == [ids[1]]
        for owner, after in ((ANOTHER, ids[1]), (OWNER, "\0"), (OWNER, "")):
            with pytest.raises(NotFound):
                await store.page(owner, limit=3, after=after)

    asyncio.run(main())


def test_watching_a_job_yields_every_change_and_the_end(store: JobStore) -> None:
    async def main() -> None:
        ahead, job = await submitted(store), await submitted(store)
        seen: list[Job] = []

        async def watch() -> None:
            async for one in store.watch(OWNER, job.id):
                seen.append(one)  # noqa: PERF401 - `until` reads it meanwhile

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(seen) < count:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        await until(1)
        await claimed(store)
        await until(2)
        await claimed(store)
        await until(3)
        await store.finish("w", no_news(job), "succeeded")
        await asyncio.wait_for(watching, 10)
        assert [(one.state, one.position) for one in seen] == [
            ("queued", 1),
            ("queued", 0),
            ("running", None),
            ("succeeded", None),
        ]
        missed = [one.state async for one in store.watch(OWNER, job.id, seen[1].mark)]
        assert missed == ["succeeded"]
        assert [one async for one in store.watch(OWNER, job.id, seen[-1].mark)] == []
        assert ahead.id != job.id

    asyncio.run(main())


def test_watching_ends_when_the_server_stops(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        states = []
        async with asyncio.timeout(10):
            async for one in store.watch(OWNER, job.id):
                states.append(one.state)
                asyncio.get_running_loop().call_soon(store.stop_watching)
            assert states == ["queued"]
            assert [one.state async for one in store.watch(OWNER, job.id)] == ["queued"]

    asyncio.run(main())


def test_a_webhook_is_due_when_its_job_has_ended_and_again_without_a_report(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store)
        job = await submitted(store, webhook_url="https://example.com")
        assert await store.next_webhook(within_s=60, max_tries=3) is None
        await store.cancel(OWNER, job.id)
        due = await store.next_webhook(within_s=-1, max_tries=3)
        assert due
        assert (due.id, due.webhook_attempts) == (job.id, 1)
        again = await store.next_webhook(within_s=60, max_tries=3)
        assert again, "the first server has not reported in time"
        assert again.webhook_attempts == 2
        assert await store.next_webhook(within_s=60, max_tries=3) is None, "a server is delivering it"
        await store.note_webhook(job.id, again_in_s=-1, delivered=False)
        assert await store.next_webhook(within_s=60, max_tries=2) is None, "there are no more tries"
        assert await store.next_webhook(within_s=60, max_tries=3)
        await store.note_webhook(job.id, again_in_s=None, delivered=True)
        assert (await store.get(OWNER, job.id)).webhook_delivered_at

    asyncio.run(main())


def test_unfinished_jobs_are_counted_by_state(store: JobStore) -> None:
    async def main() -> None:
        assert await store.counts(MODELS) == (0, 0, 0, {})
        for _ in range(3):
            await submitted(store)
        await submitted(store, identity="of another server")
        await submitted(store, model="removed", identity=None)
        assert await store.finish("w", no_news(await claimed(store)), "succeeded")
        await claimed(store)
        counts = await store.counts(MODELS)
        assert (counts.queued, counts.running) == (3, 1)
        assert 0 <= counts.oldest_s < 10
        assert counts.foreign == {"of another server": 1, "removed": 1}

    asyncio.run(main())


def test_a_job_that_was_deleted_meanwhile_is_left_out(
    store: JobStore, database_url: str, open_database: Open
) -> None:
    """PostgreSQL shows each query of a transaction what was committed before the query."""

    async def main() -> None:
        job = await submitted(store)
        found = await open_database(database_url).read(
            lambda session: readable_jobs(session, [job.seq + 1, job.seq])
        )
        assert [one.id for one in found] == [job.id]

    asyncio.run(main())
