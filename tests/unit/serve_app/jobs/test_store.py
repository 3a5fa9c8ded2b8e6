"""Jobs on SQLite and on PostgreSQL: in their order, each to one runner, each to one end."""

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import RequestError
from serve_app.jobs import store as jobs_module
from serve_app.jobs.database import Database
from serve_app.jobs.store import Job, JobStore, NewJob, Owner, Running

MODELS = ["m", "other"]
OWNER = Owner("k", "images")
ANOTHER = Owner("another", "images")
MESSAGE = {"message": "broken", "code": "broken", "status": 500, "param": None}


Open = Callable[[str], Database]


@pytest.fixture
def store(database_url: str, open_database: Open) -> JobStore:
    return JobStore(open_database(database_url), max_jobs=5, ttl_s=100)


def new(**fields: Any) -> NewJob:
    given: dict[str, Any] = {"owner": OWNER, "fingerprint": "f", "model": "m"}
    return NewJob(**given | {"request": {"prompt": "a boat", "n": 1}} | fields)


def told(job: Job) -> Running:
    return Running(id=job.id, progress=[None], previews=[], log=[])


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def submitted(store: JobStore, **fields: Any) -> Job:
    job, is_new = await store.submit(new(**fields))
    assert is_new
    return job


async def claimed(store: JobStore, worker: str = "w", models: list[str] = MODELS) -> Job:
    job = await store.claim(worker, models)
    assert job
    return job


def test_a_job_is_kept_as_it_was_submitted(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store, sources=["a.png"], encoding={"format": "png"}, answer={"x": [1, None]})
        again = await store.get(OWNER, job.id)
        assert again == job
        assert (job.state, job.position, job.sources, job.answer) == (
            "queued",
            0,
            ["a.png"],
            {"x": [1, None]},
        )
        assert job.request == {"prompt": "a boat", "n": 1}
        other_api = Owner("k", "fal")
        for owner, job_id in ((ANOTHER, job.id), (other_api, job.id), (OWNER, "none"), (OWNER, "\0")):
            with pytest.raises(RequestError, match="no such job") as caught:
                await store.get(owner, job_id)
            assert caught.value.status == 404

    run(main())


def test_jobs_begin_in_order_those_of_low_priority_last_and_each_model_for_itself(store: JobStore) -> None:
    async def main() -> None:
        low = await submitted(store, priority="low")
        first = await submitted(store)
        other = await submitted(store, model="other")
        second = await submitted(store)
        assert [(await store.get(OWNER, job.id)).position for job in (low, first, other, second)] == [
            2,
            0,
            0,
            1,
        ]
        assert (await claimed(store, models=["other"])).id == other.id
        assert [(await claimed(store)).id for _ in range(3)] == [first.id, second.id, low.id]
        assert await store.claim("w", MODELS) is None

    run(main())


def test_no_two_runners_get_the_same_job(store: JobStore) -> None:
    async def main() -> None:
        ids = {(await submitted(store)).id for _ in range(5)}
        found = await asyncio.gather(*(store.claim(f"w{i}", MODELS) for i in range(8)))
        got = [job.id for job in found if job]
        while job := await store.claim("w", MODELS):  # one who lost a race may have gone away with nothing
            got.append(job.id)
        assert sorted(got) == sorted(ids)

    run(main())


def test_beyond_the_bound_jobs_are_refused_until_one_has_ended(store: JobStore) -> None:
    async def main() -> None:
        results = await asyncio.gather(*(store.submit(new()) for _ in range(9)), return_exceptions=True)
        refused = [one for one in results if isinstance(one, RequestError)]
        assert [one.status for one in refused] == [429] * 4
        assert refused[0].headers["Retry-After"]
        job = await claimed(store)
        with pytest.raises(RequestError):
            await store.check_room()
        assert await store.finish("w", told(job), "succeeded")
        await store.check_room()

    run(main())


def test_an_idempotency_key_makes_one_job_of_several_requests(store: JobStore) -> None:
    async def main() -> None:
        results = await asyncio.gather(*(store.submit(new(idempotency_key="i")) for _ in range(4)))
        assert len({job.id for job, _ in results}) == 1
        assert sum(is_new for _, is_new in results) == 1
        known = await store.known(new(idempotency_key="i"))
        assert known
        assert known.id == results[0][0].id
        with pytest.raises(RequestError) as caught:
            await store.submit(new(idempotency_key="i", fingerprint="g"))
        assert caught.value.status == 409
        assert (await submitted(store, idempotency_key="i", owner=ANOTHER)).id != known.id
        assert await store.known(new(idempotency_key="j")) is None

    run(main())


def test_a_running_job_tells_how_it_gets_on_and_ends_with_its_images(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        began = await claimed(store)
        assert (began.state, began.attempts, began.position) == ("running", 1, None)
        news = Running(id=job.id, progress=[{"stage": "prior", "done": 1, "total": 2}], previews=[], log=[])
        assert await store.renew("w", [news]) == {job.id}
        seen = await store.get(OWNER, job.id)
        assert seen.progress == news.progress
        assert seen.version > began.version
        assert await store.finish("w", told(job), "succeeded", images=[{"name": "b.png"}])
        ended = await store.get(OWNER, job.id)
        assert (ended.state, ended.images, ended.error) == ("succeeded", [{"name": "b.png"}], None)
        assert ended.ended_at
        assert ended.expires_at == pytest.approx(ended.ended_at + 100, abs=0.1)
        assert not await store.finish("w", told(job), "failed", error=MESSAGE), "it has ended once"
        assert await store.renew("w", [news]) == set()

    run(main())


def test_a_job_whose_runner_is_not_heard_of_is_begun_again_and_ended_by_the_new_one_alone(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(jobs_module, "LEASE_S", -1)
        await submitted(store)
        first = await claimed(store, "dead")
        later = await submitted(store)
        monkeypatch.setattr(jobs_module, "LEASE_S", 15)
        again = await claimed(store, "alive")
        assert (again.id, again.attempts) == (first.id, 2)
        assert (await claimed(store, "alive")).id == later.id
        assert await store.renew("dead", [told(first)]) == set()
        assert not await store.finish("dead", told(first), "succeeded", images=[{"name": "late.png"}])
        assert await store.finish("alive", told(first), "succeeded", images=[{"name": "b.png"}])
        assert (await store.get(OWNER, first.id)).images == [{"name": "b.png"}]

    run(main())


def test_a_job_that_runs_is_nobody_elses(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store)
        await claimed(store)
        assert await store.claim("another", MODELS) is None

    run(main())


def test_who_is_late_to_renew_does_not_begin_its_own_job_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(jobs_module, "LEASE_S", -1)
        job = await submitted(store)
        await claimed(store)
        assert await store.claim("w", MODELS) is None
        monkeypatch.setattr(jobs_module, "LEASE_S", 15)
        assert await store.renew("w", []) == {job.id}
        assert await store.claim("another", MODELS) is None

    run(main())


def test_a_job_over_which_its_runners_die_is_given_up(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(jobs_module, "LEASE_S", -1)
        job = await submitted(store)
        for attempt in range(jobs_module.MAX_ATTEMPTS):
            assert await store.tidy() == []
            await claimed(store, f"w{attempt}")
        assert await store.claim("w", MODELS) is None
        (ended,) = await store.tidy()
        assert (ended.id, ended.state) == (job.id, "failed")
        assert ended.error
        assert ended.error["code"] == "interrupted"

    run(main())


def test_what_a_server_leaves_when_it_stops_goes_back_to_its_place(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await submitted(store)
        await claimed(store, "stopping")
        await store.release("stopping")
        assert (await store.get(OWNER, job.id)).position == 0
        again = await claimed(store, "w")
        assert (again.id, again.attempts) == (job.id, 1), "stopping does not count against it"

    run(main())


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        assert (await store.cancel(OWNER, job.id)).state == "cancelled"
        assert (await store.cancel(OWNER, job.id)).state == "cancelled", "it can be asked for again"
        assert await store.claim("w", MODELS) is None
        with pytest.raises(RequestError) as caught:
            await store.cancel(ANOTHER, job.id)
        assert caught.value.status == 404

    run(main())


def test_a_running_job_is_cancelled_by_its_runner_and_not_ended_otherwise(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        assert not await store.finish("w", told(job), "cancelled"), "nobody asked for that"
        asked = await store.cancel(OWNER, job.id)
        assert (asked.state, asked.cancelling) == ("running", True)
        assert await store.renew("w", []) == set()
        assert not await store.finish("w", told(job), "succeeded", images=[{"name": "b.png"}])
        assert await store.finish("w", told(job), "cancelled")
        assert (await store.get(OWNER, job.id)).state == "cancelled"

    run(main())


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_what_has_ended_cannot_be_cancelled(store: JobStore, state: jobs_module.State) -> None:
    async def main() -> None:
        job = await submitted(store)
        await claimed(store)
        assert await store.finish("w", told(job), state, error=MESSAGE)
        with pytest.raises(RequestError, match=f"has {state} already") as caught:
            await store.cancel(OWNER, job.id)
        assert caught.value.status == 409
        assert (await store.get(OWNER, job.id)).state == state

    run(main())


def test_what_has_ended_is_deleted_by_its_owner_and_nothing_else(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        with pytest.raises(RequestError, match="is queued; cancel it first") as caught:
            await store.purge(OWNER, job.id)
        assert caught.value.status == 409
        await claimed(store)
        with pytest.raises(RequestError, match="is running; cancel it first"):
            await store.purge(OWNER, job.id)
        assert await store.finish("w", told(job), "succeeded", images=[{"name": "b.png"}])
        with pytest.raises(RequestError, match="no such job"):
            await store.purge(ANOTHER, job.id)
        assert (await store.purge(OWNER, job.id)).files == ["b.png"]
        with pytest.raises(RequestError, match="no such job") as caught:
            await store.purge(OWNER, job.id)
        assert caught.value.status == 404

    run(main())


def test_a_job_that_is_being_cancelled_when_its_runner_dies_is_not_begun_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(jobs_module, "LEASE_S", -1)
        job = await submitted(store)
        await claimed(store)
        await store.cancel(OWNER, job.id)
        assert await store.claim("w", MODELS) is None
        (ended,) = await store.tidy()
        assert (ended.id, ended.state) == (job.id, "cancelled")

    run(main())


def test_a_job_that_has_not_begun_in_its_time_fails(store: JobStore) -> None:
    async def main() -> None:
        late = await submitted(store, start_within_s=1e-6)
        patient = await submitted(store, start_within_s=60)
        (ended,) = await store.tidy()
        assert (ended.id, ended.state) == (late.id, "failed")
        assert ended.error
        assert ended.error["code"] == "start_timeout"
        assert (await claimed(store)).id == patient.id

    run(main())


def test_a_job_that_is_late_is_not_begun_before_it_is_ended(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store, start_within_s=1e-6)
        assert await store.claim("w", MODELS) is None

    run(main())


def test_old_jobs_go(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        store = JobStore(open_database(database_url), max_jobs=5, ttl_s=60)
        hasty = JobStore(open_database(database_url), max_jobs=5, ttl_s=-1)
        await submitted(store)
        kept, old = await claimed(store), await submitted(store, sources=["a.png"])
        assert await store.finish("w", told(kept), "succeeded")
        await claimed(store)
        assert await hasty.finish("w", told(old), "succeeded", images=[{"name": "b.png"}])
        waiting = await submitted(store)
        (gone,) = await store.expire()
        assert (gone.id, gone.files) == (old.id, ["a.png", "b.png"])
        assert [job.id for job in await store.page(OWNER, limit=9)] == [waiting.id, kept.id]
        assert await store.expire() == []

    run(main())


def test_a_list_comes_by_the_page(store: JobStore) -> None:
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
            with pytest.raises(RequestError):
                await store.page(owner, limit=3, after=after)

    run(main())


def test_who_watches_a_job_sees_every_change_and_the_end(store: JobStore) -> None:
    async def main() -> None:
        ahead, job = await submitted(store), await submitted(store)
        seen: list[Job] = []

        async def watch() -> None:
            async for one in store.watch(OWNER, job.id):
                seen.append(one)  # noqa: PERF401 - it is looked at meanwhile

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(seen) < count:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        await until(1)
        await claimed(store)
        await until(2)
        await claimed(store)
        await until(3)
        await store.finish("w", told(job), "succeeded")
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

    run(main())


def test_who_watches_is_let_go_when_the_server_stops(store: JobStore) -> None:
    async def main() -> None:
        job = await submitted(store)
        states = []
        async with asyncio.timeout(10):
            async for one in store.watch(OWNER, job.id):
                states.append(one.state)
                asyncio.get_running_loop().call_soon(store.stop_watching)
            assert states == ["queued"]
            assert [one.state async for one in store.watch(OWNER, job.id)] == ["queued"]

    run(main())


def test_a_webhook_is_due_when_its_job_has_ended_and_again_when_nobody_reports(store: JobStore) -> None:
    async def main() -> None:
        await submitted(store)
        job = await submitted(store, webhook_url="https://example.com")
        assert await store.next_webhook(within_s=60, most=3) is None
        await store.cancel(OWNER, job.id)
        due = await store.next_webhook(within_s=-1, most=3)
        assert due
        assert (due.id, due.webhook_attempts) == (job.id, 1)
        again = await store.next_webhook(within_s=60, most=3)
        assert again, "who had it has not reported in time"
        assert again.webhook_attempts == 2
        assert await store.next_webhook(within_s=60, most=3) is None, "somebody has it"
        await store.note_webhook(job.id, again_in_s=-1, delivered=False)
        assert await store.next_webhook(within_s=60, most=2) is None, "it was tried often enough"
        assert await store.next_webhook(within_s=60, most=3)
        await store.note_webhook(job.id, again_in_s=None, delivered=True)
        assert (await store.get(OWNER, job.id)).webhook_delivered_at

    run(main())


def test_who_start_at_once_make_the_tables_once(database_url: str, open_database: Open) -> None:
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

    run(main())


def test_what_is_stopped_has_taken_effect_or_never_will(database_url: str, open_database: Open) -> None:
    async def main() -> None:
        begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

        def slow(_: object) -> None:
            begun.set()
            assert goes_on.wait(20)
            ended.set()

        writing = asyncio.create_task(open_database(database_url).write(slow))
        await asyncio.to_thread(begun.wait, 20)
        writing.cancel()
        await asyncio.wait([writing], timeout=0.1)
        assert not writing.done()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert ended.is_set()

    run(main())


def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database")
    with pytest.raises(ValueError, match="not a database"):
        Database(f"sqlite:///{tmp_path}/file")
    with pytest.raises(ValueError, match=r"u:\*\*\*@127\.0\.0\.1:1/d cannot be used") as caught:
        Database("postgresql://u:secret@127.0.0.1:1/d")
    assert "secret" not in str(caught.value)
