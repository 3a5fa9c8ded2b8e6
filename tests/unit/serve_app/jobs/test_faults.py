"""Faults of a running server: its loops continue after them, and its jobs still end."""

import asyncio

import pytest
from sqlalchemy import text

from serve_app.errors import Unavailable
from serve_app.jobs import runner as runner_module
from serve_app.jobs.records import StoredProgress
from tests.unit.serve_app.jobs.server import SOURCE_FILE, Make, Server
from tests.unit.serve_app.jobs.stored import OWNER, submitted


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the rounds of the loops frequent."""
    for name in ("POLL_INTERVAL_S", "RENEW_INTERVAL_S", "DELETE_INTERVAL_S"):
        monkeypatch.setattr(runner_module, name, 0.05)


@pytest.mark.usefixtures("frequent")
def test_jobs_begin_after_an_unexpected_error(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = make(faulty="claim")
        job_id = (await server.submit()).id
        server.stages.may_continue()
        async with server.runner.run_in_background():
            assert (await server.ended(job_id)).state == "succeeded"
        assert "begin jobs failed and is tried again" in caplog.text
        assert server.background.failing == []

    asyncio.run(main())


@pytest.mark.usefixtures("frequent")
def test_leases_are_renewed_after_an_unexpected_error_and_no_progress_is_lost(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = make(faulty="renew")
        job_id = (await server.submit()).id
        async with server.runner.run_in_background(), asyncio.timeout(20):
            await server.reaches("prior")
            await server.until(lambda: server.store.calls["renew"] > 2)
            assert (await server.job(job_id)).progress == [StoredProgress(stage="prior", done=1, total=2)]
            server.stages.may_continue()
            assert (await server.ended(job_id)).state == "succeeded"
        assert "renew leases failed and is tried again" in caplog.text
        assert server.background.failing == []

    asyncio.run(main())


@pytest.mark.usefixtures("frequent")
def test_overdue_jobs_end_after_an_unexpected_error(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = make(faulty="end_overdue")
        late = await submitted(server.store, start_within_s=1e-6)
        async with server.runner.run_in_background():
            job = await server.ended(late.id)
        assert job.error
        assert job.error.code == "start_timeout"
        (line,) = [vars(line) for line in caplog.records if vars(line).get("event") == "job"]
        assert (line["job"], line["outcome"], line["error"]) == (late.id, "failed", "start_timeout")
        assert "end overdue jobs failed and is tried again" in caplog.text
        assert server.background.failing == []

    asyncio.run(main())


@pytest.mark.usefixtures("frequent")
def test_expired_jobs_are_deleted_after_a_fault(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = make(faulty="delete_expired", ttl_s=-1)
        job = await submitted(server.store)
        await server.store.cancel(OWNER, job.id)
        async with server.runner.run_in_background():
            await server.until(lambda: server.store.calls["delete_expired"] > 2)
        assert await server.store.page(OWNER, limit=9) == []
        assert "delete expired jobs failed and is tried again" in caplog.text
        assert server.background.failing == []

    asyncio.run(main())


@pytest.mark.usefixtures("frequent")
def test_a_job_ends_after_an_unexpected_error(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = make(faulty="finish")
        job_id = (await server.submit()).id
        server.stages.may_continue()
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
        assert (job.state, job.attempts) == ("succeeded", 1)
        assert [image.name for image in job.images] == server.kept
        assert f"job {job_id} could not be ended and is tried again" in caplog.text

    asyncio.run(main())


@pytest.mark.usefixtures("frequent")
def test_a_job_keeps_its_images_if_the_connection_is_lost_while_its_end_is_stored(make: Make) -> None:
    async def main() -> None:
        server = make(faulty="committed")
        job_id = (await server.submit(sources=(SOURCE_FILE,))).id
        server.stages.may_continue()
        async with server.runner.run_in_background():
            job = await server.ended(job_id)
            await server.until(lambda: server.store.calls["finish"] == 2)
        assert (job.state, len(job.images)) == ("succeeded", 1)
        assert [image.name for image in job.images] == server.kept

    asyncio.run(main())


async def rename(server: Server, table: str, name: str) -> None:
    statement = text(f"ALTER TABLE {table} RENAME TO {name}")
    await server.database.write(lambda session: session.execute(statement))


def test_without_its_database_a_server_rejects_jobs_and_ends_running_ones_later(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = make()
        job_id = (await server.submit()).id
        server.stages.prior_may_continue.set()
        async with server.runner.run_in_background():
            await server.reaches("decoder")
            await rename(server, "jobs", "away")
            with pytest.raises(Unavailable):
                await server.submit()
            server.stages.decoder_may_continue.set()
            await server.until(lambda: len(server.kept) == 1)
            await rename(server, "away", "jobs")
            assert (await server.ended(job_id)).state == "succeeded"
        assert "the database failed" in caplog.text
        assert "is tried again" not in caplog.text, "the database has logged it"
        assert "a boat" not in caplog.text

    asyncio.run(main())
