"""Results that the database names and the file store lacks, as after a restore from backup, are made again.

A seed always gives the same bytes, so the old URLs are valid again. Images of edits cannot be made again: a
job's source images are deleted when it has succeeded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.observability.log import FAULT
from serve_app.background import Periodic
from serve_app.errors import RequestError, Unavailable
from serve_app.generation import codec
from serve_app.generation.events import GeneratedImage, in_order
from serve_app.generation.gate import Turn

if TYPE_CHECKING:
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.jobs.store import JobStore
    from serve_app.jobs.tables import Job

logger = logging.getLogger("ray.serve")

MARGIN_S = 300.0
"""A job that expires sooner than this, in seconds, is not restored."""
RETRY_S = 10.0
AFTER_ALL_OTHERS = Turn(math.inf, 0)


class Restorer:
    """Finds lost results and makes them again, one job at a time and after all other jobs.

    Args:
        store: keeps the jobs.
        generator: makes the images.
        files: keeps the results.
    """

    def __init__(self, store: JobStore, generator: Generator, files: FileStore) -> None:
        self._store = store
        self._generator = generator
        self._files = files
        self._identities = {model.name: model.identity for model in generator.models()}
        self._is_done = False

    @property
    def restoring(self) -> Periodic:
        """The periodic task that restores the results. It has nothing to do once it has tried all of them."""
        return Periodic(name="restore results", run=self._run, interval_s=RETRY_S, expected=(Unavailable,))

    async def _run(self) -> None:
        if self._is_done:
            return
        lost = await self._lost()
        self._is_done = True
        if not lost:
            return
        again = [job for job in lost if self._can_be_made_again(job)]
        logger.error(
            "the file store lacks results of %d jobs; %d of them are made again, the others cannot be",
            len(lost),
            len(again),
            extra=FAULT,
        )
        random.shuffle(again)  # other replicas do the same, and each does another part
        restored = [await self._restore(job) for job in again]
        logger.info("the results of %d jobs are restored", sum(restored))

    async def _lost(self) -> list[Job]:
        """Returns the jobs whose results are missing although they fit into the store.

        The store deletes the oldest files when it has too many. Those are not lost.
        """
        sizes = await self._files.sizes()
        room = self._files.max_bytes - sum(sizes.values())
        earliest = time.time() + MARGIN_S
        lost: list[Job] = []
        async with aclosing(self._store.succeeded()) as newest_first:
            async for job in newest_first:
                missing = [
                    image.bytes
                    for image in job.images
                    # A file may be newer than the list.
                    if image.name not in sizes and await self._files.size(image.name) is None
                ]
                room -= sum(missing)
                if room < 0:
                    break
                if missing and job.expires_at and job.expires_at > earliest:
                    lost.append(job)
        return lost

    def _can_be_made_again(self, job: Job) -> bool:
        """Returns whether the same bytes can be made here. A language model may expand a prompt anew."""
        same = job.identity is not None and self._identities.get(job.model) == job.identity
        return same and not job.sources and not job.request.expand_prompt

    async def _restore(self, job: Job) -> bool:
        """Makes a job's images again and keeps them under their names; returns whether they are there."""
        try:
            if None not in [await self._files.size(image.name) for image in job.images]:
                return True
            async with (
                self._generator.resume(job.resolved(()), AFTER_ALL_OTHERS) as running,
                aclosing(self._generator.run(running)) as events,
            ):
                made = in_order([event async for event in events if isinstance(event, GeneratedImage)])
            for image, record in zip(made, job.images, strict=True):
                data = await asyncio.to_thread(codec.encode, image.pixels, job.encoding.as_encoding())
                await self._files.save_as(record.name, data)
        except RequestError as error:
            facts = FAULT | {"job": job.id}
            logger.warning("the results of job %s are not restored: %s", job.id, error.message, extra=facts)
            return False
        except Exception:
            facts = FAULT | {"job": job.id}
            logger.exception("the results of job %s are not restored", job.id, extra=facts)
            return False
        return True
