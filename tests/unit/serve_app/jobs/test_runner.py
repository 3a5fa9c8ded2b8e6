"""The job runner on SQLite and on PostgreSQL, with stages that stand in for Ray's."""

import asyncio

import numpy as np
import pytest
from sqlalchemy import update

from serve_app.errors import NotFound
from serve_app.generation import codec
from serve_app.jobs import runner as runner_module
from serve_app.jobs import store as store_module
from serve_app.jobs.records import StoredError, StoredProgress
from serve_app.jobs.tables import Job, Owner
from serve_app.observability import metrics
from tests.unit.serve_app.jobs.server import SOURCE, SOURCE_FILE, FailingStages, Make
from tests.unit.serve_app.jobs.stored import OWNER, submitted


def test_a_job_is_made_as_submitted_and_only_its_images_are_kept(make: Make) -> None:
    async def main() -> None:
        server = make()
        fields = {"n": 2, "seed": 5, "guidance_scale": 3.0, "partial_images": 1, "sources": (SOURCE_FILE,)}
        job_id = (await server.submit(**fields)).id
        (source,) = server.kept
        async with server.runner.run_in_background():
            server.stages.prior_may_continue.set()
            await server.until(lambda: len(server.kept) == 2)  # the other image waits for the decoder
            server.stages.decoder_may_continue.set()
            job = await server.ended(job_id)
            await server.until(lambda: len(server.kept) == 2)
        assert job.state == "succeeded"
        assert [image.seed for image in job.images] == [5, 6]
        assert sorted(image.name for image in job.images) == server.kept
        assert source not in server.kept
        assert [line.message for line in job.log][:2] == ["began", "image 0: prior stage"]
        units = sorted(server.stages.decoded, key=lambda unit: unit.seed)
        assert [(one.seed, one.steps, one.guidance_scale, one.previews) for one in units] == [
            (5, 2, 3.0, 1),
            (6, 2, 3.0, 1),
        ]
        assert np.array_equal(units[0].sources[0], SOURCE)

    asyncio.run(main())


def test_the_seed_is_drawn_at_submission(make: Make) -> None:
    async def main() -> None:
        server = make()
        job = await server.submit()
        assert 0 <= job.request.seed < 2**53
        server.stages.may_continue()
        async with server.runner.run_in_background():
            assert (await server.ended(job.id)).images[0].seed == job.request.seed

    asyncio.run(main())


def test_a_running_job_shows_progress_and_previews(make: Make) -> None:
    async def main() -> None:
        server = make()
        job_id = (await server.submit(partial_images=1)).id
        server.stages.prior_may_continue.set()
        async with server.runner.run_in_background(), asyncio.timeout(20):
            async for job in server.store.watch(OWNER, job_id):
                if job.previews:
                    break
            assert job.progress == [StoredProgress(stage="decoder", done=1, total=2)]
            assert (job.previews[0].image, job.previews[0].index) == (0, 0)
            assert await server.files.size(job.previews[0].name)

    asyncio.run(main())


def test_a_stopping_server_puts_its_job_back_and_the_next_one_makes_it(make: Make) -> None:
    async def main() -> None:
        server, later = make(), make()
        job_id = (await server.submit(sources=(SOURCE_FILE,), seed=7)).id
        async with server.runner.run_in_background():
            await server.reaches("prior")
        assert server.stages.stopped == ["prior"]
        assert (await server.job(job_id)).state == "queued"
        later.stages.may_continue()
        async with later.runner.run_in_background():
            job = await later.ended(job_id)
        assert (job.state, job.attempts, job.images[0].seed) == ("succeeded", 1, 7)

    asyncio.run(main())


def test_a_frozen_server_does_not_end_a_job_that_another_has_taken_and_leaves_no_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        frozen, alive = make(), make()
        job_id = (await frozen.submit(seed=7)).id
        monkeypatch.setattr(store_module, "LEASE_S", 0.5)
        monkeypatch.setattr(runner_module, "RENEW_INTERVAL_S", 1000)
        frozen.stages.prior_may_continue.set()
        async with frozen.runner.run_in_background():
            await frozen.reaches("decoder")
            monkeypatch.setattr(store_module, "LEASE_S", 15)
            monkeypatch.setattr(runner_module, "RENEW_INTERVAL_S", 0.5)
            alive.stages.may_continue()
            async with alive.runner.run_in_background():
                job = await alive.ended(job_id)
            frozen.stages.may_continue()
            await frozen.until(lambda: frozen.generator.running.units == 0 and frozen.generator.units == [])
        assert (job.state, job.attempts) == ("succeeded", 2)
        assert frozen.kept == [job.images[0].name]
        assert (await alive.job(job_id)).mark == job.mark

    asyncio.run(main())


def test_a_failed_job_has_the_error_and_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[dict[str, str]] = []
    monkeypatch.setattr(metrics.ERRORS, "add", lambda **labels: counted.append(labels))

    async def main() -> None:
        server = make(FailingStages())
        job_id = (await server.submit(sources=(SOURCE_FILE,))).id
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
            await server.has_no_files()
        assert (job.state, job.images) == ("failed", [])
        assert job.error == StoredError(status=500, code="out_of_memory", message="No room on the device.")
        assert counted == [{"code": "out_of_memory"}]

    asyncio.run(main())


def test_a_fault_of_the_server_is_not_described_to_the_client(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()

        def broken(*_: object) -> str:
            raise RuntimeError("/secret/path")

        job_id = (await server.submit()).id
        monkeypatch.setattr(codec, "encode", broken)
        server.stages.may_continue()
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
        assert job.error
        assert (job.state, job.error.code) == ("failed", "server_error")
        assert "secret" not in job.error.as_error().message

    asyncio.run(main())


def test_a_job_without_its_source_file_fails(make: Make) -> None:
    async def main() -> None:
        server = make()
        job_id = (await server.submit(sources=(SOURCE_FILE,))).id
        await server.files.delete(server.kept)
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
        assert job.error
        assert job.error.code == "source_gone"

    asyncio.run(main())


def test_each_model_runs_as_many_jobs_as_its_stages_can_use(make: Make) -> None:
    async def main() -> None:
        server = make()
        config = server.generator.model("m")
        room = config.prior.max_batch_size + config.decoder.max_replicas
        ids = [(await server.submit()).id for _ in range(room + 2)]
        other = (await server.submit(model="other")).id
        async with server.runner.run_in_background():
            await server.until(lambda: len(server.generator.units) == room + 1)
            assert server.generator.running.units == room + 1
            states = [(await server.job(job_id)).state for job_id in ids]
            assert states == ["running"] * room + ["queued"] * 2
            assert (await server.job(other)).state == "running"
            server.stages.may_continue()
            for job_id in [*ids, other]:
                assert (await server.ended(job_id)).state == "succeeded"

    asyncio.run(main())


def test_a_large_job_does_not_hold_up_the_job_of_another_key(make: Make) -> None:
    async def main() -> None:
        server = make()
        server.stages.prior_may_continue.set()
        large = await server.submit(n=10, size=(1024, 1024))
        async with server.runner.run_in_background():
            await server.until(lambda: len(server.stages.decoded) == 1)
            small = await server.submit(key_id="another")
            await server.until(lambda: len(server.generator.units) == 11)
            server.stages.decoder_may_continue.set()
            await server.until(lambda: len(server.stages.decoded) == 11)
            assert (await server.ended(large.id)).state == "succeeded"
        order = [request.request_id for request in server.stages.decoded]
        assert order[:3] == [large.id, small.id, large.id]

    asyncio.run(main())


def test_a_job_for_a_model_with_another_identity_waits_and_says_for_what(make: Make) -> None:
    async def main() -> None:
        server = make()
        foreign = await submitted(server.store, identity="glm_image-0123456789abcdef")
        own = await server.submit()
        server.stages.may_continue()
        async with server.runner.run_in_background():
            assert (await server.ended(own.id)).state == "succeeded"
            job = await server.job(foreign.id)
        assert job.state == "queued"
        waits_for = server.runner.waits_for(job)
        assert waits_for
        assert "m, glm_image-0123456789abcdef" in waits_for
        assert server.runner.waits_for(await server.job(own.id)) is None

    asyncio.run(main())


def test_an_expired_job_is_deleted_with_its_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(runner_module, "DELETE_INTERVAL_S", 0.1)
        server = make()
        server.stages.may_continue()
        async with server.runner.run_in_background():
            job_id = (await server.submit()).id
            assert (await server.ended(job_id)).images
            await server.database.write(lambda session: session.execute(update(Job).values(expires_at=1)))
            await server.has_no_files()
        with pytest.raises(NotFound, match="no such job"):
            await server.job(job_id)

    asyncio.run(main())


def test_an_interrupted_job_without_its_model_waits_in_the_queue_and_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()
        identity = "glm_image-0123456789abcdef"
        foreign = await submitted(server.store, identity=identity)
        monkeypatch.setattr(store_module, "LEASE_S", -store_module.ABANDONED_S - 1)
        await server.store.claim("dead", {"m": identity})
        async with server.runner.run_in_background(), asyncio.timeout(20):
            async for job in server.store.watch(OWNER, foreign.id):
                if job.state == "queued":
                    break
            assert identity in (server.runner.waits_for(job) or "")
            assert (await server.store.counts({"m": "another"})).foreign == {identity: 1}
            longer_ago = {"start_by": 1, "started_at": 1}
            await server.database.write(lambda session: session.execute(update(Job).values(longer_ago)))
            job = await server.ended(foreign.id)
        assert job.error
        assert (job.state, job.error.code) == ("failed", "start_timeout")

    asyncio.run(main())


def test_files_of_a_purged_job_are_deleted_if_the_client_hangs_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()
        server.stages.may_continue()
        job_id = (await server.submit()).id
        async with server.runner.run_in_background():
            await server.ended(job_id)
            purge, is_purged = server.store.purge, asyncio.Event()

            async def purge_slowly(owner: Owner, job_id: str) -> Job:
                job = await purge(owner, job_id)
                is_purged.set()
                await asyncio.sleep(0)
                return job

            monkeypatch.setattr(server.store, "purge", purge_slowly)
            purging = asyncio.create_task(server.runner.purge(OWNER, job_id))
            await is_purged.wait()
            purging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await purging
            await server.has_no_files()

    asyncio.run(main())


def test_a_purged_job_is_deleted_with_its_images_at_once(make: Make) -> None:
    async def main() -> None:
        server = make()
        server.stages.may_continue()
        job_id = (await server.submit()).id
        async with server.runner.run_in_background():
            assert (await server.ended(job_id)).images
            await server.runner.purge(OWNER, job_id)
            assert server.kept == []

    asyncio.run(main())
