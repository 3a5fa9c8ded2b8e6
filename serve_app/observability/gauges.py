"""How much there is of what piles up, told to the metrics again and again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from serve_app.errors import RequestError
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.jobs.store import JobStore

TELL_S = 5.0


class Gauges:
    """Tells what waits and what is kept.

    Args:
        generator: whose requests wait.
        store: of the jobs.
        files: of the images.

    Attributes:
        jobs_queued: how many jobs wait to begin, as was told last.
    """

    jobs_queued = 0

    def __init__(self, generator: Generator, store: JobStore, files: FileStore) -> None:
        self._generator = generator
        self._store = store
        self._files = files

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Within the block they are told."""
        telling = asyncio.create_task(self._tell_on())
        try:
            yield
        finally:
            telling.cancel()

    async def _tell_on(self) -> None:
        while True:
            await self.tell()
            await asyncio.sleep(TELL_S)

    async def tell(self) -> None:
        """Set them all; those of jobs only while the database can be reached."""
        metrics.PENDING.set(self._generator.pending)
        if self._files.kept_bytes is not None:
            metrics.FILES_BYTES.set(self._files.kept_bytes)
        with suppress(RequestError):
            counts = await self._store.counts()
            self.jobs_queued = counts.queued
            metrics.JOBS.set(counts.queued, state="queued")
            metrics.JOBS.set(counts.running, state="running")
            metrics.OLDEST_JOB_SECONDS.set(counts.oldest_s)
