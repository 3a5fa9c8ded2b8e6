"""The parts of a server that run jobs, with stages that wait for the test."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config import ModelConfig
from deployments.types import Event, ImageRequest, Pixels, Preview, PriorTokens, Progress
from serve_app.background import Background
from serve_app.config import Limits, OutboundConfig, StorageConfig
from serve_app.errors import Failed, Full, Unavailable
from serve_app.files.store import FileStore
from serve_app.generation.codec import encode
from serve_app.generation.generator import Generator
from serve_app.generation.request import Encoding, GenerationRequest
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model
from serve_app.jobs.database import Database
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.store import JobStore
from serve_app.jobs.submission import Submission, Submitter
from serve_app.jobs.tables import Job
from serve_app.outbound import Outbound
from tests.unit.serve_app.jobs.stored import OWNER

SOURCE: Pixels = np.full((512, 512, 3), 9, dtype=np.uint8)
SOURCE_FILE = encode(SOURCE, Encoding())


class Stages:
    """Stages that wait until they may continue, and record what they did."""

    def __init__(self) -> None:
        self.prior_may_continue = asyncio.Event()
        self.decoder_may_continue = asyncio.Event()
        self.current = ""
        self.stopped: list[str] = []
        self.decoded: list[ImageRequest] = []

    def may_continue(self) -> None:
        self.prior_may_continue.set()
        self.decoder_may_continue.set()

    async def prior(self, _: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        self.current = "prior"
        yield Progress(done=1, total=2, seconds=0.1)
        try:
            await self.prior_may_continue.wait()
        except asyncio.CancelledError:
            self.stopped.append("prior")
            raise
        yield PriorTokens(target=np.zeros((16, 16), dtype=np.int64))

    async def decode(self, request: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        self.current = "decoder"
        self.decoded.append(request)
        yield Progress(done=1, total=2, seconds=0.1)
        if request.previews:
            yield Preview(index=0, pixels=np.zeros((8, 8, 3), dtype=np.uint8))
        try:
            await self.decoder_may_continue.wait()
        except asyncio.CancelledError:
            self.stopped.append("decoder")
            raise
        yield np.full((request.height, request.width, 3), request.seed % 256, dtype=np.uint8)


class FailingStages(Stages):
    """Stages whose prior stage fails."""

    async def prior(self, _: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        raise Failed("No room on the device.", code="out_of_memory")
        yield


class SmallFiles(FileStore):
    """A file store that is full after one file."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self._has_room = True

    async def check_room(self) -> None:
        if not self._has_room:
            raise Full("There is no room.")

    async def save_as(self, name: str, data: bytes, *, replace: bool = True) -> None:
        await self.check_room()
        self._has_room = False
        await super().save_as(name, data, replace=replace)


class FullFiles(FileStore):
    """A file store that is full while it is told to be."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self.is_full = False

    async def check_room(self) -> None:
        if self.is_full:
            raise Full("There is no room.")

    async def save_as(self, name: str, data: bytes, *, replace: bool = True) -> None:
        await self.check_room()
        await super().save_as(name, data, replace=replace)


class SlowFiles(FileStore):
    """A file store that saves nothing until it may."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self.is_saving = asyncio.Event()
        self.may_save = asyncio.Event()

    async def save_as(self, name: str, data: bytes, *, replace: bool = True) -> None:
        self.is_saving.set()
        await self.may_save.wait()
        await super().save_as(name, data, replace=replace)


class FaultyStore(JobStore):
    """A job store whose first call of one method raises an unexpected error.

    Args:
        faulty: name of the method. For `committed`, the connection is lost while `finish` commits.

    Attributes:
        calls: number of calls of each method.
    """

    def __init__(self, database: Database, *, max_jobs: int, ttl_s: float, faulty: str) -> None:
        super().__init__(database, max_jobs=max_jobs, ttl_s=ttl_s)
        self._faulty = faulty
        self.calls: Counter[str] = Counter()

    def _count(self, method: str) -> None:
        self.calls[method] += 1
        if method == self._faulty and self.calls[method] == 1:
            raise RuntimeError("unexpected")

    async def claim(self, *args: Any) -> Job | None:
        self._count("claim")
        return await super().claim(*args)

    async def renew(self, *args: Any) -> set[str]:
        self._count("renew")
        return await super().renew(*args)

    async def finish(self, *args: Any, **kwargs: Any) -> bool:
        self._count("finish")
        has_ended = await super().finish(*args, **kwargs)
        if self._faulty == "committed" and self.calls["finish"] == 1:
            raise Unavailable("the connection is lost")
        return has_ended

    async def end_overdue(self, *args: Any) -> list[Job]:
        self._count("end_overdue")
        return await super().end_overdue(*args)

    async def delete_expired(self) -> list[Job]:
        self._count("delete_expired")
        return await super().delete_expired()

    async def next_webhook(self, **kwargs: Any) -> Job | None:
        self._count("next_webhook")
        return await super().next_webhook(**kwargs)


class Server:
    """The parts of a server that jobs need.

    Args:
        database: keeps the jobs.
        folder: keeps the files.
        config: configuration of both models.
        stages: the stages of both models.
        max_jobs: see `JobStore`.
        ttl_s: see `JobStore`.
        faulty: see `FaultyStore`; empty for a store without faults.
        make_files: makes the file store.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        config: ModelConfig,
        stages: Stages,
        *,
        max_jobs: int = 100,
        ttl_s: float = 100,
        faulty: str = "",
        make_files: Callable[[StorageConfig], FileStore] = FileStore,
    ) -> None:
        limits, outbound = Limits(), Outbound(OutboundConfig())
        self.submitted = asyncio.Event()
        models = {
            name: Model(
                config=config.model_copy(update={"name": name}), prior=stages.prior, decode=stages.decode
            )
            for name in ("m", "other")
        }
        storage = StorageConfig(url=str(folder), min_free_bytes=0)
        self._folder = folder
        self.stages = stages
        self.database = database
        self.background = Background()
        self.files = make_files(storage)
        self.store = FaultyStore(database, max_jobs=max_jobs, ttl_s=ttl_s, faulty=faulty)
        self.generator = Generator(models, limits, SourceReader(outbound, self.files, limits))
        self.submitter = Submitter(self.store, self.generator, self.files, outbound, self.submitted)
        self.runner = JobRunner(self.store, self.generator, self.files, self.submitted, self.background)

    async def try_to_submit(self, idempotency_key: str | None = None, **fields: Any) -> tuple[Job, bool]:
        """Submits a request with these fields; returns its job, and whether the job is new."""
        defaults: dict[str, Any] = {"prompt": "a boat", "size": (512, 512), "key_id": "k", "steps": 2}
        submission = Submission(
            request=GenerationRequest(**defaults | fields),
            api=OWNER.api,
            base_url="http://localhost",
            idempotency_key=idempotency_key,
        )
        return await self.submitter.submit(submission)

    async def submit(self, **fields: Any) -> Job:
        """Submits a request with these fields; returns its new job."""
        job, is_new = await self.try_to_submit(**fields)
        assert is_new
        return job

    async def job(self, job_id: str) -> Job:
        return await self.store.get(OWNER, job_id)

    async def ended(self, job_id: str) -> Job:
        """Returns a job when it has ended."""
        async with asyncio.timeout(20):
            return [job async for job in self.store.watch(OWNER, job_id)][-1]

    async def reaches(self, stage: str) -> None:
        """Waits until a job is in a stage."""
        await self.until(lambda: self.stages.current == stage)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)

    async def has_no_files(self) -> None:
        """Waits until all files are deleted."""
        await self.until(lambda: self.kept == [])

    @property
    def kept(self) -> list[str]:
        """Names of the files in the file store."""
        return sorted(path.name for path in self._folder.iterdir())


Make = Callable[..., Server]
