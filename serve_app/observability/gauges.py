"""Gauges: how much work waits and how many files are kept, set again every few seconds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.jobs.store import JobStore

logger = logging.getLogger("ray.serve")

INTERVAL_S = 5.0


class Gauges:
    """Sets the gauges.

    Args:
        generator: has the waiting requests.
        store: has the jobs.
        files: has the files.

    Attributes:
        jobs_queued: queued jobs when the gauges were set last.
        jobs_foreign: numbers of those that no model here can make, by the identity of the model that they
            wait for.
    """

    def __init__(self, generator: Generator, store: JobStore, files: FileStore) -> None:
        self.jobs_queued = 0
        self.jobs_foreign: Mapping[str, int] = {}
        self._generator = generator
        self._store = store
        self._files = files

    async def update(self) -> None:
        """Sets all gauges.

        Raises:
            Unavailable: the database cannot be reached; Ray drops the gauges of jobs after a while.
        """
        metrics.PENDING.set(self._generator.pending)
        if self._files.kept_bytes is not None:
            metrics.FILES_BYTES.set(self._files.kept_bytes)
        counts = await self._store.counts({model.name: model.identity for model in self._generator.models()})
        self.jobs_queued = counts.queued
        if counts.foreign.keys() - self.jobs_foreign.keys():
            logger.warning(
                "jobs wait for models that this server lacks, by their identities: %s", dict(counts.foreign)
            )
        self.jobs_foreign = counts.foreign
        metrics.JOBS.set(counts.queued, state="queued")
        metrics.JOBS.set(counts.running, state="running")
        metrics.JOBS.set(sum(counts.foreign.values()), state="foreign")
        metrics.OLDEST_JOB_SECONDS.set(counts.oldest_s)
