"""Cancellation of jobs in every state: the work stops, and no file is left."""

import asyncio
import logging

import pytest

from serve_app.jobs import active as active_module
from serve_app.jobs import runner as runner_module
from serve_app.observability import metrics
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
        server = make(make_files=SlowFiles)
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


def test_the_log_of_a_job_that_another_server_cancels_as_it_ends_has_one_end(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_module, "MAX_LOG_LINES", 3)
    monkeypatch.setattr(runner_module, "RENEW_INTERVAL_S", 1000)

    async def main() -> None:
        server, other = make(make_files=SlowFiles), make()
        assert isinstance(server.files, SlowFiles)
        job_id = (await server.submit()).id
        server.stages.may_continue()
        async with server.runner.run_in_background():
            await server.files.is_saving.wait()
            await other.runner.cancel(OWNER, job_id)
            server.files.may_save.set()
            job = await server.ended(job_id)
            await server.has_no_files()
        lines = [line.message for line in job.log]
        assert lines == ["began", "image 0: prior stage", "image 0: decoder stage", "cancelled"]

    asyncio.run(main())


def test_a_queued_job_is_cancelled_with_its_sources_and_reported_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    counted: list[dict[str, str]] = []
    monkeypatch.setattr(metrics.JOBS_ENDED, "add", lambda **labels: counted.append(labels))

    async def main() -> None:
        server = make()
        job_id = (await server.submit(sources=(SOURCE_FILE,))).id
        assert server.kept
        for _ in range(2):
            assert (await server.runner.cancel(OWNER, job_id)).state == "cancelled"
            assert server.kept == []
        assert len(counted) == 1
        (line,) = [vars(line) for line in caplog.records if vars(line).get("event") == "job"]
        assert (line["job"], line["outcome"], line["levelname"]) == (job_id, "cancelled", "INFO")

    asyncio.run(main())
