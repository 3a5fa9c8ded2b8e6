"""What runs the jobs, over stages that stand in for Ray's, on SQLite and on PostgreSQL."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from deployments.config import ModelConfig
from deployments.types import Event, ImageRequest, Pixels, Preview, PriorTokens, Progress
from serve_app.config import Limits, OutboundConfig, StorageConfig
from serve_app.errors import RequestError
from serve_app.files.store import FileStore
from serve_app.generation import images
from serve_app.generation.generator import Generator
from serve_app.generation.image import Model
from serve_app.generation.images import Encoding
from serve_app.generation.orders import Order
from serve_app.generation.request import Generation
from serve_app.generation.sources import SourceReader
from serve_app.jobs import runner as runner_module
from serve_app.jobs import store as jobs_module
from serve_app.jobs.database import Database
from serve_app.jobs.runner import JobRunner, Submission
from serve_app.jobs.store import Job, JobStore, Owner
from serve_app.outbound import Outbound

SOURCE = np.full((512, 512, 3), 9, dtype=np.uint8)


OWNER = Owner("k", "images")


class Stages:
    """Stages that go on when they are let, and remember what they did."""

    def __init__(self) -> None:
        self.prior_goes_on = asyncio.Event()
        self.decoder_goes_on = asyncio.Event()
        self.at = ""
        self.stopped: list[str] = []
        self.decoded: list[ImageRequest] = []

    def go_on(self) -> None:
        self.prior_goes_on.set()
        self.decoder_goes_on.set()

    async def prior(self, _: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        self.at = "prior"
        yield Progress(done=1, total=2, seconds=0.1)
        try:
            await self.prior_goes_on.wait()
        except asyncio.CancelledError:
            self.stopped.append("prior")
            raise
        yield PriorTokens(target=np.zeros((16, 16), dtype=np.int64))

    async def decode(self, request: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        self.at = "decoder"
        self.decoded.append(request)
        yield Progress(done=1, total=2, seconds=0.1)
        if request.previews:
            yield Preview(index=0, pixels=np.zeros((8, 8, 3), dtype=np.uint8))
        try:
            await self.decoder_goes_on.wait()
        except asyncio.CancelledError:
            self.stopped.append("decoder")
            raise
        yield np.full((request.height, request.width, 3), request.seed % 256, dtype=np.uint8)


class Setup:
    """A server's parts, as far as jobs need them."""

    def __init__(self, database: Database, folder: Path, config: ModelConfig, stages: Stages) -> None:
        limits = Limits()
        models = {
            name: Model(
                config=config.model_copy(update={"name": name}), prior=stages.prior, decode=stages.decode
            )
            for name in ("m", "other")
        }
        self.stages = stages
        self.folder = folder
        self.files = FileStore(StorageConfig(url=str(folder), min_free_bytes=0))
        self.store = JobStore(database, max_jobs=100, ttl_s=100)
        self.generator = Generator(models, limits)
        outbound = Outbound(OutboundConfig())
        reader = SourceReader(outbound, self.files, limits)
        self.runner = JobRunner(self.store, self.generator, self.files, reader, outbound)

    async def submit(self, **fields: Any) -> tuple[Job, bool]:
        generation = Generation(prompt="a boat", size=(512, 512), key_id="k", steps=2, **fields)

        async def prepare(generation: Generation) -> Generation:
            return generation

        return await self.runner.submit(
            Submission(
                order=Order(
                    generation=generation,
                    encoding=Encoding("png"),
                    sources=len(generation.sources),
                    prepare=prepare,
                ),
                api=OWNER.api,
                answer={},
                base_url="http://here",
            )
        )

    async def job(self, **fields: Any) -> str:
        return (await self.submit(**fields))[0].id

    async def ended(self, job_id: str) -> Job:
        async with asyncio.timeout(20):
            return [job async for job in self.store.watch(OWNER, job_id)][-1]

    async def comes_to(self, stage: str) -> None:
        await self.until(lambda: self.stages.at == stage)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)

    async def no_files(self) -> None:
        await self.until(lambda: self.kept == [])

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


Make = Callable[[], Setup]


@pytest.fixture
def make(
    database_url: str,
    open_database: Callable[[str], Database],
    tmp_path: Path,
    model_config: Callable[..., ModelConfig],
) -> Make:
    """Makes the parts of a server; those of several share the database and the files."""
    return lambda: Setup(open_database(database_url), tmp_path / "files", model_config(), Stages())


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@asynccontextmanager
async def working(setup: Setup) -> AsyncIterator[None]:
    """A job is to run at once; other tests' constants do not concern it."""
    async with setup.runner.working():
        yield


def test_a_job_is_made_as_it_was_asked_for_and_only_its_images_are_kept(make: Make) -> None:
    async def main() -> None:
        setup = make()
        job_id = await setup.job(n=2, seed=5, guidance_scale=3.0, partial_images=1, sources=(SOURCE,))
        (source,) = setup.kept
        async with working(setup):
            setup.stages.prior_goes_on.set()
            await setup.until(lambda: len(setup.kept) == 3)
            setup.stages.decoder_goes_on.set()
            job = await setup.ended(job_id)
            await setup.until(lambda: len(setup.kept) == 2)
        assert job.state == "succeeded"
        assert [image["seed"] for image in job.images] == [5, 6]
        assert sorted(image["name"] for image in job.images) == setup.kept
        assert source not in setup.kept
        assert [line["message"] for line in job.log][:2] == ["began", "image 0: prior stage"]
        asked = sorted(setup.stages.decoded, key=lambda request: request.seed)
        assert [(one.seed, one.steps, one.guidance_scale, one.previews) for one in asked] == [
            (5, 2, 3.0, 1),
            (6, 2, 3.0, 1),
        ]
        assert np.array_equal(asked[0].sources[0], SOURCE)

    run(main())


def test_the_seed_is_drawn_when_the_job_is_submitted(make: Make) -> None:
    async def main() -> None:
        setup = make()
        job, _ = await setup.submit()
        assert 0 <= job.request["seed"] < 2**53
        setup.stages.go_on()
        async with working(setup):
            assert (await setup.ended(job.id)).images[0]["seed"] == job.request["seed"]

    run(main())


def test_progress_and_previews_are_told_on_the_way(make: Make) -> None:
    async def main() -> None:
        setup = make()
        job_id = await setup.job(partial_images=1)
        setup.stages.prior_goes_on.set()
        async with working(setup), asyncio.timeout(20):
            async for job in setup.store.watch(OWNER, job_id):
                if job.previews:
                    break
            assert job.progress == [{"stage": "decoder", "done": 1, "total": 2}]
            assert (job.previews[0]["image"], job.previews[0]["index"]) == (0, 0)
            assert await setup.files.size(job.previews[0]["name"])

    run(main())


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_job_cancelled_in_a_stage_stops_it_and_leaves_no_file(make: Make, stage: str) -> None:
    async def main() -> None:
        setup = make()
        job_id = await setup.job(sources=(SOURCE,), partial_images=1)
        if stage == "decoder":
            setup.stages.prior_goes_on.set()
        async with working(setup):
            await setup.comes_to(stage)
            asked = await setup.runner.cancel(OWNER, job_id)
            assert (asked.state, asked.cancelling) == ("running", True)
            assert (await setup.ended(job_id)).state == "cancelled"
            assert setup.stages.stopped == [stage]
            await setup.no_files()

    run(main())


def test_a_job_cancelled_by_another_server_stops_too(make: Make) -> None:
    async def main() -> None:
        setup, other = make(), make()
        job_id = await setup.job()
        async with working(setup):
            await setup.comes_to("prior")
            await other.runner.cancel(OWNER, job_id)
            assert (await setup.ended(job_id)).state == "cancelled"
            assert setup.stages.stopped == ["prior"]

    run(main())


def test_a_job_cancelled_while_its_images_are_stored_leaves_no_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        setup = make()
        storing, may_store = threading.Event(), threading.Event()
        save = setup.files._save

        def slow(name: str, data: bytes) -> None:
            storing.set()
            assert may_store.wait(20)
            save(name, data)

        monkeypatch.setattr(setup.files, "_save", slow)
        job_id = await setup.job(n=2)
        setup.stages.go_on()
        async with working(setup):
            await setup.until(storing.is_set)
            await setup.runner.cancel(OWNER, job_id)
            may_store.set()
            assert (await setup.ended(job_id)).state == "cancelled"
            await setup.no_files()

    run(main())


def test_a_job_cancelled_while_it_waits_never_begins_and_its_sources_go(make: Make) -> None:
    async def main() -> None:
        setup = make()
        job_id = await setup.job(sources=(SOURCE,))
        assert setup.kept
        assert (await setup.runner.cancel(OWNER, job_id)).state == "cancelled"
        assert setup.kept == []

    run(main())


def test_when_the_server_stops_its_job_goes_back_and_the_next_one_makes_it(make: Make) -> None:
    async def main() -> None:
        setup, later = make(), make()
        job_id = await setup.job(sources=(SOURCE,), seed=7)
        async with working(setup):
            await setup.comes_to("prior")
        assert setup.stages.stopped == ["prior"]
        assert (await setup.store.get(OWNER, job_id)).state == "queued"
        later.stages.go_on()
        async with working(later):
            job = await later.ended(job_id)
        assert (job.state, job.attempts, job.images[0]["seed"]) == ("succeeded", 1, 7)

    run(main())


def test_who_was_thought_dead_does_not_end_the_job_and_leaves_no_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        frozen, alive = make(), make()
        job_id = await frozen.job(seed=7)
        monkeypatch.setattr(jobs_module, "LEASE_S", 0.5)
        monkeypatch.setattr(runner_module, "RENEW_S", 1000)
        frozen.stages.prior_goes_on.set()
        async with working(frozen):
            await frozen.comes_to("decoder")
            monkeypatch.setattr(jobs_module, "LEASE_S", 15)
            monkeypatch.setattr(runner_module, "RENEW_S", 0.5)
            alive.stages.go_on()
            async with working(alive):
                job = await alive.ended(job_id)
            frozen.stages.go_on()
            await frozen.until(lambda: frozen.generator.pending == 0 and frozen.generator.units == [])
        assert (job.state, job.attempts) == ("succeeded", 2)
        assert frozen.kept == [job.images[0]["name"]]
        assert (await alive.store.get(OWNER, job_id)).mark == job.mark

    run(main())


def test_a_job_that_fails_says_why(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(_: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        raise RequestError("No room on the device.", code="out_of_memory", status=500)
        yield

    async def main() -> None:
        setup = make()
        monkeypatch.setattr(setup.stages, "prior", failing)
        failing_setup = Setup(setup.store._database, setup.folder, setup.generator.model("m"), setup.stages)
        job_id = await failing_setup.job(sources=(SOURCE,))
        async with working(failing_setup):
            job = await failing_setup.ended(job_id)
            await failing_setup.no_files()
        assert (job.state, job.images) == ("failed", [])
        assert job.error == {
            "message": "No room on the device.",
            "code": "out_of_memory",
            "status": 500,
            "param": None,
        }

    run(main())


def test_while_the_database_is_away_jobs_are_a_503_and_what_was_made_is_noted_when_it_is_back(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        setup = make()
        database = setup.store._database
        job_id = await setup.job()
        setup.stages.prior_goes_on.set()
        async with working(setup):
            await setup.comes_to("decoder")
            await database.write(
                lambda connection: connection.execute(text("ALTER TABLE jobs RENAME TO away"))
            )
            with pytest.raises(RequestError) as caught:
                await setup.job()
            assert caught.value.status == 503
            setup.stages.decoder_goes_on.set()
            await setup.until(lambda: len(setup.kept) == 1)
            await database.write(
                lambda connection: connection.execute(text("ALTER TABLE away RENAME TO jobs"))
            )
            assert (await setup.ended(job_id)).state == "succeeded"
        assert "the database failed" in caplog.text
        assert "a boat" not in caplog.text

    run(main())


def test_a_fault_of_the_server_is_not_told_in_its_words(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        setup = make()

        def broken(*_: object) -> str:
            raise RuntimeError("/secret/path")

        job_id = await setup.job()
        monkeypatch.setattr(images, "encode", broken)
        setup.stages.go_on()
        async with working(setup):
            job = await setup.ended(job_id)
        assert job.error
        assert (job.state, job.error["code"]) == ("failed", "server_error")
        assert "secret" not in job.error["message"]

    run(main())


def test_a_source_that_is_gone_fails_the_job(make: Make) -> None:
    async def main() -> None:
        setup = make()
        job_id = await setup.job(sources=(SOURCE,))
        await setup.files.delete(setup.kept)
        async with working(setup):
            job = await setup.ended(job_id)
        assert job.error
        assert job.error["code"] == "source_gone"

    run(main())


def test_so_many_run_at_a_time_as_the_stages_can_use_and_models_do_not_wait_for_each_other(
    make: Make,
) -> None:
    async def main() -> None:
        setup = make()
        config = setup.generator.model("m")
        room = config.prior.max_batch_size + config.decoder.max_replicas
        ids = [await setup.job() for _ in range(room + 2)]
        other = await setup.job(model="other")
        async with working(setup):
            await setup.until(lambda: len(setup.generator.units) == room + 1)
            assert setup.generator.pending == room + 1
            states = [(await setup.store.get(OWNER, job_id)).state for job_id in ids]
            assert states == ["running"] * room + ["queued"] * 2
            assert (await setup.store.get(OWNER, other)).state == "running"
            setup.stages.go_on()
            for job_id in [*ids, other]:
                assert (await setup.ended(job_id)).state == "succeeded"

    run(main())


def test_a_draining_server_takes_no_jobs(make: Make) -> None:
    async def main() -> None:
        setup = make()
        await setup.generator.drain()
        with pytest.raises(RequestError) as caught:
            await setup.job()
        assert caught.value.status == 503

    run(main())


def test_expired_jobs_take_their_images_with_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(runner_module, "EXPIRE_S", 0.1)
        setup = make()
        setup.store._ttl_s = 0.5
        setup.stages.go_on()
        job_id = await setup.job()
        async with working(setup):
            assert (await setup.ended(job_id)).images
            await setup.no_files()
        with pytest.raises(RequestError, match="no such job"):
            await setup.store.get(OWNER, job_id)

    run(main())


def test_a_purged_job_takes_its_images_with_it_at_once(make: Make) -> None:
    async def main() -> None:
        setup = make()
        setup.stages.go_on()
        job_id = await setup.job()
        async with working(setup):
            assert (await setup.ended(job_id)).images
            await setup.runner.purge(OWNER, job_id)
            assert setup.kept == []

    run(main())


def test_submitting_what_no_job_may_be_leaves_nothing(make: Make) -> None:
    async def main() -> None:
        setup = make()
        setup.store._max_jobs = 1
        await setup.job()
        with pytest.raises(RequestError) as caught:
            await setup.job(sources=(SOURCE,))
        assert caught.value.status == 429
        assert setup.kept == []

    run(main())
