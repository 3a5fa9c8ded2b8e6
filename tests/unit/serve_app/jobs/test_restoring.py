"""Lost results that are made again, and those that cannot be."""

import asyncio
import base64

import pytest

from serve_app.generation.delivery import Delivery
from serve_app.jobs import restoring as restoring_module
from tests.unit.serve_app.jobs.server import FullFiles, Make
from tests.unit.serve_app.jobs.stored import IMAGE, claimed, no_news, submitted


def test_a_job_of_an_older_server_is_not_restored_without_its_model(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = make(ttl_s=1000)
        job = await submitted(server.store, model="removed", identity=None)
        await claimed(server.store, models={"removed": "any"})
        assert await server.store.finish("w", no_news(job), "succeeded", images=[IMAGE])
        async with server.runner.run_in_background():
            await server.until(lambda: "lacks results" in caplog.text)
        assert "lacks results of 1 jobs; 0 of them are made again" in caplog.text
        assert "not restored" not in caplog.text

    asyncio.run(main())


def test_a_result_that_was_restored_with_more_bytes_is_whole(make: Make) -> None:
    async def main() -> None:
        server = make()
        server.stages.may_continue()
        job_id = (await server.submit()).id
        async with server.runner.run_in_background():
            (image,) = (await server.ended(job_id)).images
        file = b"encoded by another version" * image.bytes
        await server.files.save_as(image.name, file)
        (kept,) = await Delivery(server.generator, server.files).kept([image], "png", None)
        assert base64.b64decode(kept.base64 or "") == file

    asyncio.run(main())


def test_results_are_restored_after_a_failure(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restoring_module, "RETRY_S", 0.01)

    async def main() -> None:
        before, after = make(ttl_s=1000), make(make_files=FullFiles, ttl_s=1000)
        for server in (before, after):
            server.stages.may_continue()
        job_id = (await before.submit()).id
        async with before.runner.run_in_background():
            (image,) = (await before.ended(job_id)).images
        await before.files.delete([image.name])
        files = after.files
        assert isinstance(files, FullFiles)
        files.is_full = True
        async with after.runner.run_in_background():
            await after.until(lambda: "not restored" in caplog.text)
            files.is_full = False
            await after.until(lambda: after.kept == [image.name])
        assert caplog.text.count("lacks results of 1 jobs") == 1

    asyncio.run(main())
