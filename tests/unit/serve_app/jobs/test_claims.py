"""Claims of jobs on SQLite and on PostgreSQL: their order, the leases, and one end for each job."""

import asyncio
import threading
import uuid
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from serve_app.errors import Conflict, NotFound
from serve_app.jobs import store as store_module
from serve_app.jobs.records import LogLine, StoredProgress
from serve_app.jobs.store import JobProgress, JobStore
from tests.unit.serve_app.jobs.stored import (
    ANOTHER,
    BROKEN,
    IMAGE,
    MODELS,
    OWNER,
    Open,
    claimed,
    no_news,
    submitted,
)


def test_jobs_begin_in_order_by_priority_and_model(store: JobStore) -> None:
    async def main() -> None:
        low = await submitted(store, priority="low")
        first = await submitted(store)
        other = await submitted(store, model="other")
        second = await submitted(store)
        positions = [(await store.get(OWNER, job.id)).position for job in (low, first, other, second)]
        assert positions == [2, 0, 0, 1]
        assert (await claimed(store, models={"other": MODELS["other"]})).id == other.id
        assert [(await claimed(store)).id for _ in range(3)] == [first.id, second.id, low.id]
        assert await store.claim("w", MODELS) is None

    asyncio.run(main())


def test_a_queued_job_gets_another_priority_and_a_new_turn(store: JobStore) -> None:
    async def main() -> None:
        first, second = await submitted(store, work=2), await submitted(store, work=2)
        low = await submitted(store, work=2, priority="low")
        changed = await store.prioritize(first.id, "low")
        assert (changed.priority, changed.position, changed.version) == ("low", 2, first.version + 1)
        assert (await store.prioritize(low.id, "normal")).position == 1
        again = await store.prioritize(low.id, "normal")
        assert again.version == low.version + 1, "it had that priority already"
        assert [(await claimed(store)).id for _ in range(3)] == [second.id, low.id, first.id]
        with pytest.raises(Conflict, match="running"):
            await store.prioritize(first.id, "normal")
        with pytest.raises(NotFound):
            await store.prioritize(str(uuid.UUID(int=0)), "low")

    asyncio.run(main())


def test_a_watcher_sees_a_new_priority(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        changes = store.watch(OWNER, job.id, "")
        await anext(changes)
        await store.prioritize(job.id, "low")
        assert (await anext(changes)).priority == "low"
        await changes.aclose()

    asyncio.run(main())


def test_a_job_is_begun_only_by_a_model_with_its_identity(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        assert await store.claim("w", {"m": "another"}) is None
        assert await store.claim("w", {"other": MODELS["m"]}) is None
        assert (await claimed(store)).id == job.id

    asyncio.run(main())


def test_a_job_of_an_older_server_is_begun_by_the_model_of_its_name(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store, identity=None)
        assert await store.claim("w", {"other": MODELS["other"]}) is None
        assert (await claimed(store)).id == job.id

    asyncio.run(main())


def test_each_key_gets_the_same_work_done_and_keeps_its_order(store: JobStore) -> None:
    async def main() -> None:
        large = [(await submitted(store, work=100)).id for _ in range(2)]
        small = [(await submitted(store, owner=ANOTHER, work=40)).id for _ in range(3)]
        begun = [(await claimed(store)).id for _ in range(5)]
        assert begun == [large[0], small[0], small[1], small[2], large[1]]

    asyncio.run(main())


def test_a_key_that_was_idle_has_saved_up_no_turns(store: JobStore) -> None:
    async def main() -> None:
        first = [(await submitted(store, work=100)).id for _ in range(3)]
        assert [(await claimed(store)).id for _ in range(2)] == first[:2]
        late = [(await submitted(store, owner=ANOTHER, work=100)).id for _ in range(2)]
        assert [(await claimed(store)).id for _ in range(3)] == [late[0], first[2], late[1]]

    asyncio.run(main())


def test_keys_can_be_left_out(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store)
        other = await submitted(store, owner=ANOTHER)
        begun = await store.claim("w", MODELS, without_keys=[OWNER.key_id])
        assert begun
        assert begun.id == other.id
        assert await store.claim("w", MODELS, without_keys=[OWNER.key_id]) is None

    asyncio.run(main())


def test_no_two_runners_claim_the_same_job(store: JobStore) -> None:
    async def main() -> None:
        ids = {(await submitted(store)).id for _ in range(5)}
        found = await asyncio.gather(*(store.claim(f"w{i}", MODELS) for i in range(8)))
        claimed_ids = [job.id for job in found if job]
        while job := await store.claim("w", MODELS):  # a runner that lost a race may have got no job
            claimed_ids.append(job.id)
        assert sorted(claimed_ids) == sorted(ids)

    asyncio.run(main())


def test_a_running_job_shows_its_progress_and_ends_once(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        begun = await claimed(store)
        assert (begun.state, begun.attempts, begun.position) == ("running", 1, None)
        news = JobProgress(id=job.id, progress=[StoredProgress(stage="prior", done=1, total=2)])
        assert await store.renew("w", [job.id], [news]) == {job.id}
        seen = await store.get(OWNER, job.id)
        assert seen.progress == news.progress
        assert seen.version > begun.version
        assert await store.finish("w", no_news(job), "succeeded", images=[IMAGE])
        ended = await store.get(OWNER, job.id)
        assert (ended.state, ended.images, ended.error) == ("succeeded", [IMAGE], None)
        assert ended.ended_at
        assert ended.expires_at == pytest.approx(ended.ended_at + 100, abs=0.1)
        assert not await store.finish("w", no_news(job), "failed", error=BROKEN)
        assert await store.renew("w", [job.id], [news]) == set()

    asyncio.run(main())


def test_an_end_whose_answer_was_lost_can_be_asked_for_again(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        news = JobProgress(id=job.id, log=[LogLine(at=1, message="succeeded")])
        assert await store.finish("w", news, "succeeded", images=[IMAGE])
        assert await store.finish("w", news, "succeeded", images=[IMAGE])
        other_end = JobProgress(id=job.id, log=[LogLine(at=2, message="succeeded")])
        assert not await store.finish("w", other_end, "succeeded", images=[IMAGE])

    asyncio.run(main())


def test_a_job_of_a_dead_runner_is_begun_again_and_ended_by_the_new_runner_only(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        await submitted(store)
        first = await claimed(store, "dead")
        later = await submitted(store)
        monkeypatch.setattr(store_module, "LEASE_S", 15)
        again = await claimed(store, "alive")
        assert (again.id, again.attempts) == (first.id, 2)
        assert (await claimed(store, "alive")).id == later.id
        assert await store.renew("dead", [first.id], [no_news(first)]) == set()
        late = [replace(IMAGE, name="late.png")]
        assert not await store.finish("dead", no_news(first), "succeeded", images=late)
        assert await store.finish("alive", no_news(first), "succeeded", images=[IMAGE])
        assert (await store.get(OWNER, first.id)).images == [IMAGE]

    asyncio.run(main())


def test_a_running_job_is_not_claimed_by_another_runner(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store)
        await claimed(store)
        assert await store.claim("another", MODELS) is None

    asyncio.run(main())


def test_a_runner_that_renews_late_does_not_begin_its_own_job_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        job = await submitted(store)
        await claimed(store)
        assert await store.claim("w", MODELS, [job.id]) is None
        assert await store.end_overdue(MODELS, [job.id]) == []
        monkeypatch.setattr(store_module, "LEASE_S", 15)
        assert await store.renew("w", [job.id]) == {job.id}
        assert await store.claim("another", MODELS) is None

    asyncio.run(main())


def test_a_runner_that_has_lost_its_own_job_begins_it_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        job = await submitted(store)
        await claimed(store)
        monkeypatch.setattr(store_module, "LEASE_S", 15)
        assert await store.renew("w", []) == set()
        again = await claimed(store)
        assert (again.id, again.attempts) == (job.id, 2)

    asyncio.run(main())


def test_a_runner_does_not_begin_a_job_again_before_it_has_stopped_it(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store, "w")
        await store.release("w")  # as another server does that had taken the job and stops
        assert await store.claim("w", MODELS, [job.id]) is None
        assert (await claimed(store, "w")).id == job.id

    asyncio.run(main())


def test_an_orphan_stays_with_the_servers_that_have_its_model(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage of the database, its own server may renew its lease first."""

    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -store_module.ABANDONED_S - 1)
        job = await submitted(store)
        await claimed(store)
        await store.end_overdue(MODELS)
        assert await store.renew("w", [job.id]) == {job.id}
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        assert await store.renew("w", [job.id]) == {job.id}
        await store.end_overdue({"m": "another"})  # too early
        assert await store.renew("w", [job.id]) == {job.id}
        monkeypatch.setattr(store_module, "LEASE_S", -store_module.ABANDONED_S - 1)
        assert await store.renew("w", [job.id]) == {job.id}
        await store.end_overdue({"m": "another"})
        assert (await store.get(OWNER, job.id)).state == "queued"
        assert await store.renew("w", [job.id]) == set()
        # It has as much time again, although it was submitted with less.
        assert await store.end_overdue(MODELS) == []
        assert (await claimed(store)).id == job.id

    asyncio.run(main())


def test_a_runner_does_not_end_its_own_job_after_an_outage_of_the_database(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        job = await submitted(store)
        for attempt in range(store_module.MAX_ATTEMPTS):
            await claimed(store, f"w{attempt}")
        assert await store.end_overdue(MODELS, [job.id]) == []
        assert await store.finish(f"w{attempt}", no_news(job), "succeeded", images=[IMAGE])

    asyncio.run(main())


def test_a_job_whose_runners_keep_dying_fails(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        job = await submitted(store)
        for attempt in range(store_module.MAX_ATTEMPTS):
            assert await store.end_overdue(MODELS) == []
            await claimed(store, f"w{attempt}")
        assert await store.claim("w", MODELS) is None
        (ended,) = await store.end_overdue(MODELS)
        assert (ended.id, ended.state) == (job.id, "failed")
        assert ended.error
        assert ended.error.code == "interrupted"

    asyncio.run(main())


def test_a_stopping_server_puts_its_jobs_back_to_their_places(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await submitted(store)
        await claimed(store, "stopping")
        await store.release("stopping")
        assert (await store.get(OWNER, job.id)).position == 0
        again = await claimed(store, "w")
        assert (again.id, again.attempts) == (job.id, 1), "a stop does not count as an attempt"

    asyncio.run(main())


def test_a_job_that_goes_back_into_the_queue_meanwhile_is_cancelled(
    database_url: str, open_database: Open, store: JobStore
) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        has_released, may_commit = threading.Event(), threading.Event()

        def release(session: Session) -> None:
            session.execute(text("UPDATE jobs SET state = 'queued', worker = NULL, lease_until = NULL"))
            has_released.set()
            assert may_commit.wait(20)

        releasing = asyncio.create_task(open_database(database_url).write(release))
        await asyncio.to_thread(has_released.wait, 20)
        cancelling = asyncio.create_task(store.cancel(OWNER, job.id))
        await asyncio.wait([cancelling], timeout=0.3)
        assert not cancelling.done()
        may_commit.set()
        await releasing
        cancelled, has_ended = await cancelling
        assert (cancelled.state, has_ended) == ("cancelled", True)

    asyncio.run(main())


def test_a_job_that_is_cancelled_when_its_runner_dies_is_not_begun_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "LEASE_S", -1)
        job = await submitted(store)
        await claimed(store)
        await store.cancel(OWNER, job.id)
        assert await store.claim("w", MODELS) is None
        (ended,) = await store.end_overdue(MODELS)
        assert (ended.id, ended.state) == (job.id, "cancelled")

    asyncio.run(main())
