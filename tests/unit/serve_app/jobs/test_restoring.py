"""Lost results that are made again, and those that cannot be."""

import asyncio

import pytest

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
