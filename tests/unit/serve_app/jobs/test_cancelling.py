"""Cancellation of jobs in every state: the work stops, and no file is left."""

import asyncio

import pytest

from tests.unit.serve_app.jobs.server import SOURCE_FILE, Make, SlowFiles
from tests.unit.serve_app.jobs.stored import OWNER


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_cancelling_a_job_in_a_stage_stops_the_stage_and_leaves_no_file(make: Make, stage: str) -> None:
    async def main() -> None:
        server = make()
        job_id = (await server.submit(sources=(SOURCE_FILE,), partial_images=1)).id
        if stage == "decoder":
            server.stages.prior_may_continue.set()
        async with server.runner.run_in_background():
            await server.reaches(stage)
            cancelling = await server.runner.cancel(OWNER, job_id)
            assert (cancelling.state, cancelling.cancelling) == ("running", True)
            assert (await server.ended(job_id)).state == "cancelled"
            assert server.stages.stopped == [stage]
            await server.has_no_files()

    asyncio.run(main())


def test_a_job_is_stopped_when_another_server_cancels_it(make: Make) -> None:
    async def main() -> None:
        server, other = make(), make()
        job_id = (await server.submit()).id
        async with server.runner.run_in_background():
            await server.reaches("prior")
            await other.runner.cancel(OWNER, job_id)
            assert (await server.ended(job_id)).state == "cancelled"
            assert server.stages.stopped == ["prior"]

    asyncio.run(main())


def test_cancelling_a_job_whose_images_are_being_stored_leaves_no_file(make: Make) -> None:
    async def main() -> None:
        server = make(slow_files=True)
        assert isinstance(server.files, SlowFiles)
        job_id = (await server.submit(n=2)).id
        server.stages.may_continue()
        async with server.runner.run_in_background():
            await server.files.is_saving.wait()
            await server.runner.cancel(OWNER, job_id)
            server.files.may_save.set()
            assert (await server.ended(job_id)).state == "cancelled"
            await server.has_no_files()

    asyncio.run(main())


def test_a_queued_job_is_cancelled_with_its_sources(make: Make) -> None:
    async def main() -> None:
        server = make()
        job_id = (await server.submit(sources=(SOURCE_FILE,))).id
        assert server.kept
        assert (await server.runner.cancel(OWNER, job_id)).state == "cancelled"
        assert server.kept == []

    asyncio.run(main())
