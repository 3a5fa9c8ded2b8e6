"""Jobs that wait for a file store that is full or fails."""

import asyncio
from typing import Any

import pytest

from serve_app.errors import Full
from serve_app.jobs import runner as runner_module
from tests.unit.serve_app.jobs.server import FullFiles, Make
from tests.unit.serve_app.jobs.stored import OWNER, submitted


def test_jobs_wait_while_the_file_store_is_full(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_INTERVAL_S", 0.01)

    async def main() -> None:
        server = make(make_files=FullFiles)
        files: Any = server.files
        first = (await server.submit()).id
        async with server.runner.run_in_background(), asyncio.timeout(20):
            await server.reaches("prior")
            files.is_full = True
            # Rounds that began before have ended.
            await server.until(lambda: "begin jobs" in server.background.failing)
            second = await submitted(server.store, identity=None)
            server.stages.may_continue()
            waits_for = server.runner.waits_for(await server.job(second.id))
            assert waits_for == "It waits for the server's file storage."
            async for job in server.store.watch(OWNER, first):
                if any("waits for the file storage" in line.message for line in job.log):
                    break
            assert (await server.job(first)).state == "running"
            # Its deadline has no say any more, and the model can be unloaded.
            assert (server.generator.running.units, server.generator.running.needed()) == (0, [])
            files.is_full = False
            job = await server.ended(first)
            assert (await server.ended(second.id)).state == "succeeded"
        assert (job.state, job.attempts, len(job.images)) == ("succeeded", 1, 1)
        messages = [line.message for line in job.log]
        assert messages.count("waits for the file storage: There is no room.") == 1

    asyncio.run(main())


def test_no_job_begins_while_another_one_waits_with_its_image(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "POLL_INTERVAL_S", 0.01)

    async def main() -> None:
        server = make()
        save_as, quota = server.files.save_as, 1

        async def limited(name: str, data: bytes) -> None:
            nonlocal quota
            if not quota:
                raise Full("There is no room.")  # which only a writer learns
            quota -= 1
            await save_as(name, data)

        monkeypatch.setattr(server.files, "save_as", limited)
        first = (await server.submit(n=2)).id
        server.stages.may_continue()
        async with server.runner.run_in_background(), asyncio.timeout(20):
            async for job in server.store.watch(OWNER, first):
                if any("waits for the file storage" in line.message for line in job.log):
                    break
            assert len(server.kept) == 1  # the other image waits
            second = (await server.submit()).id
            await server.until(lambda: "begin jobs" in server.background.failing)
            assert (await server.job(second)).state == "queued"
            quota = 9
            for job_id in (first, second):
                assert (await server.ended(job_id)).state == "succeeded"

    asyncio.run(main())


def test_a_job_waits_while_its_images_cannot_be_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "FAILURE_PAUSE_S", 0.01)

    async def main() -> None:
        server = make()
        server.stages.may_continue()
        job_id = (await server.submit()).id
        fail_once(monkeypatch, server.files, "_save")
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
        assert (job.state, job.attempts) == ("succeeded", 1)
        waits = "waits for the file storage: The file could not be kept; the server's log says why."
        assert waits in [line.message for line in job.log]

    asyncio.run(main())


def test_a_job_fails_if_its_images_can_never_be_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "MAX_FAILURES", 1)

    async def main() -> None:
        server = make()
        server.stages.may_continue()
        job_id = (await server.submit(n=2)).id
        fail_once(monkeypatch, server.files, "_save")
        async with server.runner.run_in_background():
            assert (await server.ended(job_id)).state == "failed"
            await server.has_no_files()

    asyncio.run(main())


def fail_once(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
    """Makes the next call of a method fail."""
    method = getattr(target, name)

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(target, name, method)
        raise OSError("the store does not answer")

    monkeypatch.setattr(target, name, fail)


def test_a_job_that_waits_for_room_can_be_cancelled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_INTERVAL_S", 0.01)

    async def main() -> None:
        server = make(make_files=FullFiles)
        files: Any = server.files
        job = await server.submit()
        async with server.runner.run_in_background(), asyncio.timeout(20):
            await server.reaches("prior")
            files.is_full = True
            server.stages.may_continue()
            await server.until(lambda: "begin jobs" in server.background.failing)
            await server.runner.cancel(OWNER, job.id)
            assert (await server.ended(job.id)).state == "cancelled"
            await server.has_no_files()

    asyncio.run(main())
