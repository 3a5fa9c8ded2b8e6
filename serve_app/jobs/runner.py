"""The job runner: takes jobs from the store in their order, makes their images and reports their progress."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from deployments.observability import tracing
from deployments.observability.log import FAULT
from serve_app.background import Periodic, to_its_end
from serve_app.errors import Failed, Full, Gone, RequestError, Unavailable
from serve_app.generation import codec
from serve_app.generation.delivery import ImageRecord, record
from serve_app.generation.events import GeneratedImage, PartialImage, in_order
from serve_app.generation.gate import Turn
from serve_app.jobs.active import ActiveJob
from serve_app.jobs.ends import HANDED_ON, report_end
from serve_app.jobs.records import StoredError, StoredPreview, StoredProgress
from serve_app.jobs.restoring import Restorer
from serve_app.jobs.store import JobProgress
from serve_app.jobs.tables import PRIORITIES
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.config import ModelConfig
    from deployments.types import Pixels
    from serve_app.background import Background
    from serve_app.files.store import FileStore
    from serve_app.generation.events import Event
    from serve_app.generation.generator import Generator
    from serve_app.jobs.store import JobStore
    from serve_app.jobs.tables import Job, Owner, State

logger = logging.getLogger("ray.serve")

POLL_INTERVAL_S = 1.0
"""Seconds between two searches for jobs that were submitted to another server, or whose server has died."""
RENEW_INTERVAL_S = 0.5
DELETE_INTERVAL_S = 60.0
FAILURE_PAUSE_S = 10.0
MAX_FAILURES = 30
"""Number of failures in a row, with such pauses between them, after which an image cannot be kept."""
STOP_TIMEOUT_S = 30.0
"""Seconds for the storing of images when the server stops. Leases that end meanwhile are not renewed."""


class JobRunner:
    """Runs as many jobs at a time as keep the stages of each model busy.

    Args:
        store: keeps the jobs.
        generator: makes the images.
        files: keeps source images and results.
        submitted: set when a job was enqueued.
        background: runs the periodic tasks.
    """

    def __init__(
        self,
        store: JobStore,
        generator: Generator,
        files: FileStore,
        submitted: asyncio.Event,
        background: Background,
    ) -> None:
        self._store = store
        self._generator = generator
        self._files = files
        self._wake = submitted
        self._background = background
        self._worker = uuid.uuid4().hex
        self._identities = {model.name: model.identity for model in generator.models()}
        self._restorer = Restorer(store, generator, files)
        self._files_are_full = False
        self._active: dict[str, ActiveJob] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def run_in_background(self) -> AsyncIterator[None]:
        """Runs jobs within the block. Jobs that still run at its end go back into the queue."""
        # The database logs that it is away. A full file store is shown by the jobs.
        task = partial(Periodic, expected=(Unavailable, Full))
        self._tasks = self._background.start(
            [
                task(name="begin jobs", run=self._begin_jobs, interval_s=POLL_INTERVAL_S, wake=self._wake),
                task(name="renew leases", run=self._renew, interval_s=RENEW_INTERVAL_S),
                task(name="end overdue jobs", run=self._end_overdue, interval_s=POLL_INTERVAL_S),
                task(name="delete expired jobs", run=self._delete_expired, interval_s=DELETE_INTERVAL_S),
                self._restorer.restoring,
            ]
        )
        try:
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Begins no more jobs, puts running ones back into the queue, and ends the calls that watch jobs."""
        await self._background.stop(self._tasks)
        active = list(self._active.values())
        for one in active:
            one.stop("server stops")
        if tasks := [one.task for one in active if one.task]:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
        with suppress(RequestError):  # the leases will expire
            await self._store.release(self._worker)
        self._store.stop_watching()

    async def cancel(self, owner: Owner | None, job_id: str) -> Job:
        """Cancels a job; see `JobStore.cancel`. One that runs here stops within a pass or a step."""
        return await to_its_end(self._cancel(owner, job_id))

    async def _cancel(self, owner: Owner | None, job_id: str) -> Job:
        job, has_ended = await self._store.cancel(owner, job_id)
        if has_ended:
            report_end(job, job.state)
            await self._delete_files(job)
        elif active := self._active.get(job_id):
            active.stop("taken or cancelled")
        return job

    async def purge(self, owner: Owner, job_id: str) -> Job:
        """Deletes an ended job and its files; see `JobStore.purge`."""
        return await to_its_end(self._purge(owner, job_id))

    async def _purge(self, owner: Owner, job_id: str) -> Job:
        job = await self._store.purge(owner, job_id)
        await self._files.delete(job.files)
        return job

    async def _begin_jobs(self) -> None:
        """Begins jobs while there is room for them, and for their files.

        Raises:
            Full: the file store has no room. The jobs wait.
        """
        try:
            await self._files.check_room()
        except Full:
            self._files_are_full = True
            raise
        # A quota is not seen before a file is written. Further jobs would wait with their pixels, too.
        self._files_are_full = any(one.waiting for one in self._active.values())
        if self._files_are_full:
            raise Full("A job waits for the file store.")
        for model in self._generator.models():
            identity = {model.name: model.identity}
            while (without := self._keys_without_room(model)) is not None:
                job = await self._store.claim(self._worker, identity, list(self._active), without)
                if job is None:
                    break
                await self._delete_files(job, sources=False)  # what an earlier runner has left
                self._begin(job)

    def _begin(self, job: Job) -> None:
        news = JobProgress(id=job.id, progress=[None] * job.request.n, log=list(job.log))
        active = self._active[job.id] = ActiveJob(job=job, unfinished=job.request.n, news=news)
        active.log("began" if job.attempts == 1 else f"began again: attempt {job.attempts}")
        active.task = asyncio.create_task(self._run(active))
        active.task.add_done_callback(partial(self._remove, job.id))

    def _remove(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self._active[job_id]
        self._wake.set()

    def _keys_without_room(self, model: ModelConfig) -> set[str] | None:
        """Returns the keys whose next jobs for a model must wait; None if all must.

        A model has room for as many images as keep it busy: a batch for each prior, and one for each decoder.
        When the room is used up, only keys without a job here may begin one. So large jobs of one key do not
        block another key. While requests fill the model, no job begins: it would only wait, and its time
        limit for the start would no longer apply.
        """
        if not self._generator.takes_jobs(model.name):
            return None
        room = model.prior.max_batch_size * model.prior.max_replicas + model.decoder.max_replicas
        active = [one for one in self._active.values() if one.job.model == model.name]
        if sum(one.unfinished for one in active) < room:
            return set()
        return {one.job.key_id for one in active} if len(active) < room else None

    def waits_for(self, job: Job) -> str | None:
        """Returns what a queued job waits for, if it is not for other jobs; None otherwise."""
        identity = self._identities.get(job.model)
        if job.state != "queued":
            return None
        if identity and job.identity in (identity, None):
            return "It waits for the server's file storage." if self._files_are_full else None
        return (
            f"It waits for a server with the model that it was submitted to: {job.model}, "
            f"{job.identity or 'of any identity'}. This server has "
            f"{', '.join(f'{name}, {identity}' for name, identity in self._identities.items())}."
        )

    async def _renew(self) -> None:
        """Renews the leases, stores the news, and stops jobs that are not to run here any more."""
        active = list(self._active.values())
        if not active:
            return
        news = [one.news for one in active if one.has_news]
        for one in active:
            one.has_news = False
        try:
            ours = await self._store.renew(self._worker, [one.job.id for one in active], news)
        except Exception:
            for one in active:
                one.has_news = True
            raise
        for one in active:
            if one.job.id not in ours:
                one.stop("taken or cancelled")

    async def _end_overdue(self) -> None:
        for job in await self._store.end_overdue(self._identities, list(self._active)):
            report_end(job, job.state, why=job.error)
            await self._delete_files(job)

    async def _delete_expired(self) -> None:
        while expired := await self._store.delete_expired():
            await self._files.delete(name for job in expired for name in job.files)

    async def _delete_files(self, job: Job, *, sources: bool = True) -> None:
        """Deletes a job's previews and, if wanted, its source images."""
        await self._files.delete([one.name for one in job.previews] + (job.sources if sources else []))

    async def _run(self, active: ActiveJob) -> None:
        """Makes a job's images and ends it."""
        job = active.job
        with tracing.span(
            "job", parent=job.request.traceparent, job=job.id, api=job.api, attempt=job.attempts
        ):
            began = time.monotonic()
            state: State = "succeeded"
            made: list[ImageRecord] = []
            why: StoredError | None = None
            try:
                made = await self._make(active)
            except asyncio.CancelledError:
                if not active.stopped:
                    raise
                state = "cancelled"
            except RequestError as error:
                state, why = "failed", StoredError.of(error)
            except Exception:
                logger.exception("job %s failed", job.id, extra=FAULT | {"job": job.id})
                state, why = "failed", StoredError.of(_NOT_MADE)
            active.ending.set()
            ended = await self._end(active, state, made, why)
            await self._clear(active, keep=ended == "succeeded")
            if ended:
                await self._files.delete(job.sources)
            why = why if ended == "failed" else None
            report_end(job, ended, time.monotonic() - began, why)
            tracing.note(error=why.code if why else "", model=job.model, outcome=ended or HANDED_ON)

    async def _end(
        self, active: ActiveJob, state: State, made: list[ImageRecord], why: StoredError | None
    ) -> State | None:
        """Ends a job in the store; returns its state, or None if this server does not end it."""
        if active.stopped == "server stops":
            return None
        active.log_end(state)
        if await self._finish(active, state, made, why):
            return state
        if state == "cancelled":
            return None
        # It was cancelled just now, or it is another server's.
        active.log_end("cancelled")
        return "cancelled" if await self._finish(active, "cancelled") else None

    async def _finish(
        self,
        active: ActiveJob,
        state: State,
        made: list[ImageRecord] | None = None,
        why: StoredError | None = None,
    ) -> bool:
        """Calls `JobStore.finish` until it succeeds. Otherwise the job would be made again."""
        while True:
            try:
                return await self._store.finish(
                    self._worker, active.news, state, images=made or [], error=why
                )
            except Unavailable:
                pass  # the database logs that
            except Exception:
                facts = FAULT | {"job": active.job.id}
                logger.exception("job %s could not be ended and is tried again", active.job.id, extra=facts)
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _make(self, active: ActiveJob) -> list[ImageRecord]:
        """Makes and keeps a job's images; returns their records."""
        job = active.job
        files = [await self._read(name) for name in job.sources]
        pixels = await self._generator.decode_sources(files, job.model)
        turn = Turn(PRIORITIES.index(job.priority), job.turn)
        made: list[GeneratedImage] = []
        async with (
            self._generator.resume(job.resolved(pixels), turn) as running,
            aclosing(self._generator.run(running)) as events,
        ):
            async for event in events:
                if isinstance(event, GeneratedImage):
                    made.append(event)
                    active.unfinished -= 1
                    self._wake.set()
                else:
                    self._note(active, event)
        # The request has ended. A wait for room neither counts towards its deadline nor holds its model.
        made = in_order(made)
        if problem := made[0].facts.not_expanded:
            active.log(f"the prompt was not expanded: {problem}")
        active.saves = [asyncio.create_task(self._save_when_possible(active, image.pixels)) for image in made]
        # Cancelling this task cancels none of them.
        done, _ = await asyncio.wait(active.saves, return_when=asyncio.FIRST_EXCEPTION)
        for save in done:
            save.result()
        return [record(image, *save.result()) for image, save in zip(made, active.saves, strict=True)]

    async def _read(self, name: str) -> bytes:
        if (data := await self._files.read_all(name)) is None:
            raise Gone("A source image was deleted; submit the job again.", code="source_gone")
        return data

    async def _save_when_possible(self, active: ActiveJob, pixels: Pixels) -> tuple[str, int]:
        """Keeps an image. Since its work is done, it waits for room, and tries again after failures."""
        file = await self._encoded(active.job, pixels)
        failures, is_waiting = 0, False
        try:
            while True:
                try:
                    return await self._save(active.job, file)
                except (Full, Failed) as error:
                    if not is_waiting:
                        active.log(f"waits for the file storage: {error.message}")
                        active.waiting += 1
                    is_waiting = True
                    failures = failures + 1 if isinstance(error, Failed) else 0
                    pause_s = FAILURE_PAUSE_S if failures else POLL_INTERVAL_S
                    if failures == MAX_FAILURES or not await active.pause(pause_s):
                        raise
        finally:
            active.waiting -= is_waiting

    async def _save(self, job: Job, file: bytes) -> tuple[str, int]:
        """Keeps a file in the job's format; returns its name and its bytes."""
        with metrics.part(job.model, "storing"):
            return await self._files.save(file, job.encoding.as_encoding().format), len(file)

    async def _encoded(self, job: Job, pixels: Pixels) -> bytes:
        """Returns an image as a file in the job's format."""
        encoding = job.encoding.as_encoding()
        with metrics.part(job.model, "encoding"):
            return await asyncio.to_thread(codec.encode, pixels, encoding)

    def _note(self, active: ActiveJob, event: Event) -> None:
        """Notes an event of the running request."""
        if isinstance(event, PartialImage):
            active.previewing.add(asyncio.create_task(self._preview(active, event)))
        elif not isinstance(event, GeneratedImage):
            before, progress = active.news.progress[event.image], event.progress
            if before is None or before.stage != event.stage:
                active.log(f"image {event.image}: {event.stage} stage")
            active.news.progress[event.image] = StoredProgress(
                stage=event.stage, done=progress.done, total=progress.total
            )
            active.has_news = True

    async def _preview(self, active: ActiveJob, event: PartialImage) -> None:
        try:
            name, _ = await self._save(active.job, await self._encoded(active.job, event.pixels))
        except RequestError:
            return  # the image itself may find room, or fails with the reason
        active.news.previews.append(StoredPreview(image=event.image, index=event.index, name=name))
        active.has_news = True

    async def _clear(self, active: ActiveJob, *, keep: bool) -> None:
        """Deletes a job's previews and, unless `keep`, its images."""
        if under_way := [*active.saves, *active.previewing]:
            await asyncio.wait(under_way)
        names = [one.name for one in active.news.previews]
        if not keep:
            names += [save.result()[0] for save in active.saves if not save.exception()]
        await self._files.delete(names)


_NOT_MADE = Failed("The server failed to make the images; its log says why. Submit the job again.")
