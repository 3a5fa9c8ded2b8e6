"""Submission of jobs: a rejected one leaves nothing behind."""

import asyncio
from typing import Any

import pytest

from serve_app.background import end_calls
from serve_app.errors import Busy, Conflict, Failed, Full, InvalidParameter, Unavailable
from serve_app.generation.request import GenerationRequest
from serve_app.jobs.tables import Job
from tests.unit.serve_app.jobs.server import SOURCE_FILE, Make, SmallFiles
from tests.unit.serve_app.jobs.stored import OWNER


def test_a_draining_server_rejects_jobs(make: Make) -> None:
    async def main() -> None:
        server = make()
        await server.generator.drain()
        with pytest.raises(Unavailable):
            await server.submit()

    asyncio.run(main())


def test_a_job_beyond_the_limit_leaves_no_file(make: Make) -> None:
    async def main() -> None:
        server = make(max_jobs=1)
        await server.submit()
        with pytest.raises(Busy):
            await server.submit(sources=(SOURCE_FILE,))
        assert server.kept == []

    asyncio.run(main())


def test_a_job_beyond_the_limit_does_not_count_towards_the_rate(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make(max_jobs=1)
        await server.submit()
        charged: list[GenerationRequest] = []

        async def charge(request: GenerationRequest) -> None:
            charged.append(request)

        monkeypatch.setattr(server.generator, "charge", charge)
        for key in (None, "i"):
            with pytest.raises(Busy):
                await server.try_to_submit(idempotency_key=key)
        assert not charged

    asyncio.run(main())


def test_an_unreadable_source_is_rejected(make: Make) -> None:
    async def main() -> None:
        server = make()
        with pytest.raises(InvalidParameter):
            await server.submit(sources=(b"no image",))
        assert server.kept == []

    asyncio.run(main())


def test_an_idempotency_key_names_the_first_job_and_keeps_its_sources_once(make: Make) -> None:
    async def main() -> None:
        server = make()
        first, is_new = await server.try_to_submit(idempotency_key="i", sources=(SOURCE_FILE,))
        assert is_new
        again, is_new = await server.try_to_submit(idempotency_key="i", sources=(SOURCE_FILE,))
        assert (again.id, is_new, again.request.seed) == (first.id, False, first.request.seed)
        assert server.kept == first.sources
        with pytest.raises(Conflict):
            await server.try_to_submit(idempotency_key="i", steps=3, sources=(SOURCE_FILE,))
        assert server.kept == first.sources

    asyncio.run(main())


def test_a_job_whose_sources_do_not_fit_leaves_no_file(make: Make) -> None:
    async def main() -> None:
        server = make(make_files=SmallFiles)
        with pytest.raises(Full):
            await server.submit(sources=(SOURCE_FILE, SOURCE_FILE))
        assert server.kept == []

    asyncio.run(main())


def test_a_job_whose_sources_cannot_be_kept_leaves_no_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()
        save_as, saved = server.files.save_as, list[str]()

        async def fail_at_the_second(name: str, data: bytes) -> None:
            if saved:
                raise Failed("The file could not be kept.")
            saved.append(name)
            await save_as(name, data)

        monkeypatch.setattr(server.files, "save_as", fail_at_the_second)
        with pytest.raises(Failed):
            await server.submit(sources=(SOURCE_FILE, SOURCE_FILE))
        assert server.kept == []

    asyncio.run(main())


def test_a_client_that_hangs_up_while_its_sources_are_kept_leaves_no_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()
        save_as, saved, is_saving = server.files.save_as, list[str](), asyncio.Event()

        async def hang_at_the_second(name: str, data: bytes) -> None:
            if saved:
                is_saving.set()
                await asyncio.Event().wait()
            saved.append(name)
            await save_as(name, data)

        monkeypatch.setattr(server.files, "save_as", hang_at_the_second)
        submitting = asyncio.create_task(server.submit(sources=(SOURCE_FILE, SOURCE_FILE)))
        await is_saving.wait()
        assert server.kept == saved
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert server.kept == []

    asyncio.run(main())


def test_a_client_that_hangs_up_while_its_job_is_stored_leaves_a_whole_job(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        server = make()
        submit, is_stored = server.store.submit, asyncio.Event()

        async def submit_slowly(*args: Any) -> tuple[Job, bool]:
            stored = await submit(*args)
            is_stored.set()
            await asyncio.sleep(0)
            return stored

        monkeypatch.setattr(server.store, "submit", submit_slowly)
        first = await server.submit(sources=(SOURCE_FILE,), prompt="a boat")
        is_stored.clear()
        submitting = asyncio.create_task(server.try_to_submit("key", sources=(SOURCE_FILE,), prompt="a ship"))
        await is_stored.wait()
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await end_calls(20)
        second, _ = await server.store.page(OWNER, limit=9)
        assert sorted(first.sources + second.sources) == server.kept
        assert server.submitted.is_set()

    asyncio.run(main())


def test_a_full_server_still_answers_a_repeated_submission_with_its_job(make: Make) -> None:
    async def main() -> None:
        server = make(make_files=SmallFiles)
        first, _ = await server.try_to_submit(idempotency_key="i", sources=(SOURCE_FILE,))
        with pytest.raises(Full):
            await server.submit()
        again, is_new = await server.try_to_submit(idempotency_key="i", sources=(SOURCE_FILE,))
        assert (again.id, is_new) == (first.id, False)

    asyncio.run(main())
