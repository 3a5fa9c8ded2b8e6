"""Runs the jobs: takes them from the store in their order, makes their images, tells how they get on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
import uuid
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from deployments.observability import tracing
from deployments.observability.log import FAULT
from serve_app.errors import InvalidParameter, RequestError
from serve_app.generation import images
from serve_app.generation.delivery import described, failure
from serve_app.generation.images import Encoding
from serve_app.generation.request import GeneratedImage, Generation, PartialImage, StageProgress
from serve_app.jobs.store import NewJob, Owner, Running
from serve_app.observability import metrics, telemetry
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from deployments.types import Pixels
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.generation.orders import Order
    from serve_app.generation.request import Resolved
    from serve_app.generation.sources import SourceReader
    from serve_app.jobs.store import Job, JobStore, Priority, State
    from serve_app.outbound import Outbound

logger = logging.getLogger("ray.serve")

LOOK_S = 1.0
"""How often to look for jobs that other ingresses were given, or have left."""
RENEW_S = 0.5
EXPIRE_S = 60.0
STOP_S = 30.0
"""For what is just being stored."""
MAX_LOG_LINES = 200
WEBHOOK_URL = re.compile("[!-~]{1,2048}")
NOT_STORED = {"sources", "api", "request_id", "key_id"}
"""Of a generation; a job has them elsewhere."""


def stored(generation: Resolved) -> dict[str, Any]:
    """A generation, but for its source images, as a job keeps it."""
    return {name: value for name, value in vars(generation).items() if name not in NOT_STORED}


def _fingerprint(what: Submission, generation: Generation) -> str:
    """Equal for equal requests, whatever seed is drawn for them and by which address they came."""
    apart = NOT_STORED | {"traceparent"}
    asked = {name: value for name, value in vars(generation).items() if name not in apart}
    encoding = vars(what.order.encoding)
    rest = (what.api, encoding, what.answer, what.priority, what.start_within_s, what.webhook_url)
    digest = hashlib.sha256(json.dumps([asked, *rest], sort_keys=True).encode())
    for source in generation.sources:
        digest.update(f"{source.shape}".encode())
        digest.update(source.tobytes())
    return digest.hexdigest()


def restored(job: Job) -> Generation:
    """A job's generation, without its source images."""
    sizes = {
        name: tuple(size) for name in ("size", "crop") if (size := job.request.get(name))
    }  # JSON's lists
    return Generation(**job.request | sizes, api=job.api, request_id=job.id, key_id=job.key_id)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to become a job. See `NewJob` for what is not said here.

    Attributes:
        order: what is to be made.
        api: by which it came.
        base_url: below which URLs were that the client used.
    """

    order: Order
    api: str
    answer: Mapping[str, Any]
    base_url: str
    priority: Priority = "normal"
    start_within_s: float | None = None
    idempotency_key: str | None = None
    webhook_url: str | None = None


@dataclass(eq=False, kw_only=True)
class _Run:
    """A job that runs here.

    Attributes:
        job: as it was when it began.
        told: what there is to tell of it.
        task: makes it.
        is_news: whether there is something that was not told yet.
        stopped: why it is to stop: it is no longer to be run, or not by this server.
        is_ending: whether it has come too far for that.
        saves: its images on their way into the store, which nothing stops.
        previewing: its previews likewise.
    """

    job: Job
    told: Running
    task: asyncio.Task[None] | None = None
    is_news: bool = True
    stopped: Literal["", "not ours", "later"] = ""
    is_ending: bool = False
    saves: list[asyncio.Task[tuple[str, int]]] = field(default_factory=list)
    previewing: set[asyncio.Task[None]] = field(default_factory=set)

    def stop(self, why: Literal["not ours", "later"]) -> None:
        if not self.is_ending and not self.stopped and self.task:
            self.stopped = why
            self.task.cancel()

    def log(self, message: str) -> None:
        if len(self.told.log) < MAX_LOG_LINES:
            self.told.log.append({"at": time.time(), "message": message})
            self.is_news = True


class JobRunner:
    """Runs as many jobs at a time as keep each model's stages busy.

    Args:
        store: where they are.
        generator: makes the images.
        files: where source images and results are.
        reader: decodes source images.
        outbound: the way of webhooks.
    """

    def __init__(
        self,
        store: JobStore,
        generator: Generator,
        files: FileStore,
        reader: SourceReader,
        outbound: Outbound,
    ) -> None:
        self._store = store
        self._generator = generator
        self._files = files
        self._reader = reader
        self._outbound = outbound
        self._worker = uuid.uuid4().hex
        self._running: dict[str, _Run] = {}
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Within the block jobs are run; what still runs at its end goes back into the queue."""
        self._loops = [
            asyncio.create_task(_again_and_again(what))
            for what in (self._begin_some, self._tell, self._tidy, self._expire)
        ]
        try:
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Begin with no more jobs, put those that run back into the queue, and let go who watches them."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        runs = list(self._running.values())
        for run in runs:
            run.stop("later")
        if tasks := [run.task for run in runs if run.task]:
            await asyncio.wait(tasks, timeout=STOP_S)
        with suppress(RequestError):  # whose leases will run out
            await self._store.release(self._worker)
        self._store.stop_watching()

    async def submit(self, what: Submission) -> tuple[Job, bool]:
        """Check a request and make it a job; returns that, and whether it is new, see `JobStore.submit`.

        Raises:
            RequestError: 404, there is no such model; 409, its idempotency key was used for another request;
                429, there are too many jobs, or the key's work is used up; 503, the server is stopping; 507,
                there is no room for files.
            InvalidParameter: a parameter is out of its range, or the webhook leads nowhere.
        """
        order, generation = what.order, what.order.generation
        self._generator.check(generation, sources=order.sources)
        await self._files.check_room()
        if what.webhook_url is not None:
            await self._check_webhook(what.webhook_url)
        if what.idempotency_key is None:
            await self._store.check_room()
        if order.prepare:
            generation = await order.prepare(generation)
        resolved = self._generator.resolved(generation)
        new = NewJob(
            owner=Owner(generation.key_id, what.api),
            fingerprint=await asyncio.to_thread(_fingerprint, what, generation),  # of up to 50 MB of pixels
            model=resolved.model,
            request=stored(replace(resolved, traceparent=tracing.traceparent())),
            encoding=vars(order.encoding),
            answer={**what.answer, "base_url": what.base_url},
            priority=what.priority,
            start_within_s=what.start_within_s,
            idempotency_key=what.idempotency_key,
            webhook_url=what.webhook_url,
        )
        if what.idempotency_key is not None and (known := await self._store.known(new)):
            return known, False
        await self._generator.charge(resolved)
        sources = [
            await self._files.save(await asyncio.to_thread(images.encode, source, Encoding()), "png")
            for source in generation.sources
        ]
        is_new = False
        try:
            job, is_new = await self._store.submit(replace(new, sources=sources))
        finally:
            if not is_new:
                await self._files.delete(sources)
        self._wake.set()
        return job, is_new

    async def _check_webhook(self, url: str) -> None:
        if not WEBHOOK_URL.fullmatch(url):
            raise InvalidParameter(
                "webhook_url", "must have at most 2048 characters, printable ones of ASCII"
            )
        try:
            await self._outbound.check(url)
        except OutboundError as error:
            raise InvalidParameter("webhook_url", error.problem) from error

    async def cancel(self, owner: Owner, job_id: str) -> Job:
        """Cancel a job, see `JobStore.cancel`; one that runs here stops within a token or a step."""
        job = await self._store.cancel(owner, job_id)
        if job.state == "cancelled":
            await self._forget(job)
        elif run := self._running.get(job_id):
            run.stop("not ours")
        return job

    async def purge(self, owner: Owner, job_id: str) -> Job:
        """Delete an ended job and its files now, see `JobStore.purge`."""
        job = await self._store.purge(owner, job_id)
        await self._files.delete(job.files)
        return job

    async def _begin_some(self) -> None:
        """Begin with jobs while there is room; then wait until there may be some again."""
        self._wake.clear()
        while models := self._with_room():
            job = await self._store.claim(self._worker, models)
            if job is None:
                break
            await self._forget(job, sources=False)  # what whoever began before has left
            told = Running(id=job.id, progress=[None] * job.request["n"], previews=[], log=job.log)
            run = self._running[job.id] = _Run(job=job, told=told)
            run.log("began" if job.attempts == 1 else f"began again: attempt {job.attempts}")
            run.task = asyncio.create_task(self._run(run))
            run.task.add_done_callback(partial(self._has_ended, job.id))
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._wake.wait()

    def _has_ended(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self._running[job_id]
        self._wake.set()

    def _with_room(self) -> list[str]:
        """The models whose stages can have more to do: a batch of the prior's, and one image a decoder."""
        return [
            model.name
            for model in self._generator.models()
            if sum(run.job.request["n"] for run in self._running.values() if run.job.model == model.name)
            < model.prior.max_batch_size * model.prior.max_replicas + model.decoder.max_replicas
        ]

    async def _tell(self) -> None:
        """Renew the leases, store what there is to tell, and stop what is no longer to be run."""
        if runs := list(self._running.values()):
            news = [run.told for run in runs if run.is_news]
            for run in runs:
                run.is_news = False
            try:
                ours = await self._store.renew(self._worker, news)
            except RequestError:
                for run in runs:
                    run.is_news = True
                raise
            for run in runs:
                if run.job.id not in ours:
                    run.stop("not ours")
        await asyncio.sleep(RENEW_S)

    async def _tidy(self) -> None:
        for job in await self._store.tidy():
            facts = FAULT | {"job": job.id}
            logger.warning("job %s %s: nobody ran it to its end", job.id, job.state, extra=facts)
            await self._forget(job)
        await asyncio.sleep(LOOK_S)

    async def _expire(self) -> None:
        while expired := await self._store.expire():
            await self._files.delete(name for job in expired for name in job.files)
        await asyncio.sleep(EXPIRE_S)

    async def _forget(self, job: Job, *, sources: bool = True) -> None:
        """Delete the files that are of no use any more."""
        await self._files.delete([one["name"] for one in job.previews] + (job.sources if sources else []))

    async def _run(self, run: _Run) -> None:
        """Make a job's images and end it."""
        job = run.job
        with tracing.span(
            "job", parent=job.request.get("traceparent", ""), job=job.id, api=job.api, attempt=job.attempts
        ):
            await self._run_traced(run)

    async def _run_traced(self, run: _Run) -> None:
        began = time.monotonic()
        state: State = "succeeded"
        made: list[dict[str, Any]] = []
        why: dict[str, Any] | None = None
        try:
            made = await self._make(run)
        except asyncio.CancelledError:
            if not run.stopped:
                raise
            state = "cancelled"
        except (RequestError, InvalidParameter) as error:
            state, why = "failed", failure(error)
        except Exception:
            logger.exception("job %s failed", run.job.id, extra=FAULT | {"job": run.job.id})
            state, why = "failed", failure(_FAULT)
        run.is_ending = True
        stored = False
        if run.stopped != "later":
            run.log(state)
            stored = await self._end(run, state, made, why)
            if not stored and state != "cancelled":  # it was cancelled just now, unless it is another's
                state = "cancelled"
                run.told.log[-1]["message"] = state
                stored = await self._end(run, state)
        await self._clear(run, keep=stored and state == "succeeded")
        if stored:
            await self._files.delete(run.job.sources)
        outcome = state if stored else "handed on"
        if stored:
            metrics.JOBS_ENDED.add(api=run.job.api, model=run.job.model, state=state)
        telemetry.note_job_end(run.job, outcome, time.monotonic() - began, why)

    async def _end(
        self,
        run: _Run,
        state: State,
        made: list[dict[str, Any]] | None = None,
        why: dict[str, Any] | None = None,
    ) -> bool:
        """End it in the store, however long that cannot be reached; whether it was ours to end."""
        while True:
            try:
                return await self._store.finish(self._worker, run.told, state, images=made or [], error=why)
            except RequestError:
                await asyncio.sleep(LOOK_S)

    async def _make(self, run: _Run) -> list[dict[str, Any]]:
        """Make and keep a job's images; returns what is to be known of them."""
        job, generation = run.job, restored(run.job)
        if job.sources:
            files = [await self._read(name) for name in job.sources]
            generation = await self._reader.add(
                generation, files, self._generator.model(generation.model).traits
            )
        async with self._generator.resumed(generation):
            made = await self._generator.run(generation, partial(self._note, run))
            if problem := made[0].not_expanded:
                run.log(f"the prompt was not expanded: {problem}")
            run.saves = [asyncio.create_task(self._save(run, image.pixels)) for image in made]
            await asyncio.wait(run.saves)  # which stops none of them when this is stopped
            return [described(image, *save.result()) for image, save in zip(made, run.saves, strict=True)]

    async def _read(self, name: str) -> bytes:
        size = await self._files.size(name)
        data = None if size is None else await self._files.read(name, 0, size)
        if data is None:
            raise RequestError(
                "A source image is not there any more; submit the job again.", code="source_gone", status=410
            )
        return data

    async def _save(self, run: _Run, pixels: Pixels) -> tuple[str, int]:
        """Keep an image in the job's format; returns its file's name and bytes."""
        encoding, model = Encoding(**run.job.encoding), run.job.model
        with metrics.part(model, "encoding"):
            data = await asyncio.to_thread(images.encode, pixels, encoding)
        with metrics.part(model, "storing"):
            return await self._files.save(data, encoding.format), len(data)

    def _note(self, run: _Run, told: StageProgress | PartialImage | GeneratedImage) -> None:
        """Note what the generator tells."""
        if isinstance(told, PartialImage):
            previewing = asyncio.create_task(self._preview(run, told))
            run.previewing.add(previewing)
        elif isinstance(told, StageProgress):
            before, progress = run.told.progress[told.image], told.progress
            if before is None or before["stage"] != told.stage:
                run.log(f"image {told.image}: {told.stage} stage")
            run.told.progress[told.image] = {
                "stage": told.stage,
                "done": progress.done,
                "total": progress.total,
            }
            run.is_news = True

    async def _preview(self, run: _Run, told: PartialImage) -> None:
        try:
            name, _ = await self._save(run, told.pixels)
        except RequestError:
            return  # the image itself may find room, or say that there is none
        run.told.previews.append({"image": told.image, "index": told.index, "name": name})
        run.is_news = True

    async def _clear(self, run: _Run, *, keep: bool) -> None:
        """Delete what was kept on the way and, unless `keep`, the images."""
        if under_way := [*run.saves, *run.previewing]:
            await asyncio.wait(under_way)
        names = [one["name"] for one in run.told.previews]
        if not keep:
            names += [save.result()[0] for save in run.saves if not save.exception()]
        await self._files.delete(names)


_FAULT = RequestError("The server failed to make it; its log says why.", code="server_error", status=500)


async def _again_and_again(what: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Whatever goes wrong: the database may be there again a moment later."""
    while True:
        try:
            await what()
        except RequestError:
            await asyncio.sleep(LOOK_S)
        except Exception:
            logger.exception("jobs: something went wrong, and is tried again", extra=FAULT)
            await asyncio.sleep(LOOK_S)
