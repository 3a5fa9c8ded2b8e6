"""Lost results that are made again, and those that cannot be."""

import asyncio
import base64

import pytest

from serve_app.generation.delivery import Delivery
from tests.unit.serve_app.jobs.server import Make
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
