"""Submission of jobs: a request is checked, its source images are kept, and the job is enqueued."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deployments.observability import tracing
from serve_app.background import to_its_end
from serve_app.errors import Busy, Conflict, InvalidParameter
from serve_app.generation import codec
from serve_app.generation.request import Encoding
from serve_app.jobs.records import StoredEncoding, StoredRequest
from serve_app.jobs.tables import Job, Priority
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.types import Pixels
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.generation.request import GenerationRequest
    from serve_app.jobs.store import JobStore
    from serve_app.outbound import Outbound

WEBHOOK_URL = re.compile("[!-~]{1,2048}")
FINGERPRINTED = (
    "prompt",
    "model",
    "size",
    "crop",
    "n",
    "steps",
    "guidance_scale",
    "negative_prompt",
    "cfg_normalization",
    "strength",
    "seed",
    "partial_images",
    "expand_prompt",
    "moderation",
    "blacken",
)
"""Parameters by which requests of one idempotency key are compared. Fingerprints are stored: keep the
names."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A request to enqueue a job; see `Job` for the other attributes.

    Attributes:
        request: the request.
        api: name of the job's kind in the store: that of the dialect, or `images` for OpenAI's.
        base_url: base of the URLs that the client used.
    """

    request: GenerationRequest
    api: str
    base_url: str
    answer: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority = "normal"
    idempotency_key: str | None = None
    webhook_url: str | None = None


class Submitter:
    """Enqueues jobs.

    Args:
        store: keeps the jobs.
        generator: checks and resolves the requests.
        files: keeps the source images.
        outbound: checks the URLs of webhooks.
        submitted: set when a job was enqueued.
    """

    def __init__(
        self,
        store: JobStore,
        generator: Generator,
        files: FileStore,
        outbound: Outbound,
        submitted: asyncio.Event,
    ) -> None:
        self._store = store
        self._generator = generator
        self._files = files
        self._outbound = outbound
        self._submitted = submitted

    async def submit(self, what: Submission) -> tuple[Job, bool]:
        """Checks a request and enqueues its job; see `JobStore.submit` for the result.

        Raises:
            NotFound: there is no such model.
            Conflict: the idempotency key was used for another request.
            Busy: there are too many jobs, or the key's rate is used up.
            Unavailable: the server is stopping.
            Full: there is no room for files.
            InvalidParameter: a parameter is out of its range, a source image cannot be used, or the webhook's
                URL is not allowed.
            TooLarge: a source image has too many bytes.
            Failed: a source image cannot be kept.
        """
        request = what.request
        self._generator.check(request)
        if what.idempotency_key is None:
            await self._store.check_room()
        pixels = await self._generator.decode_sources(request.sources, request.model)
        resolved = self._generator.resolve(request, pixels)
        job = Job(
            key_id=request.key_id,
            api=what.api,
            fingerprint=await asyncio.to_thread(_fingerprint, what, pixels),  # of up to 50 MB of pixels
            model=resolved.model,
            identity=self._generator.model(resolved.model).identity,
            request=StoredRequest.of(resolved, tracing.traceparent()),
            work=resolved.work,
            encoding=StoredEncoding(format=request.encoding.format, quality=request.encoding.quality),
            answer={**what.answer, "base_url": what.base_url},
            priority=what.priority,
            idempotency_key=what.idempotency_key,
            webhook_url=what.webhook_url,
        )
        if what.idempotency_key is not None:
            if known := await self._store.known(job):
                return known, False
            await self._store.check_room()
        if what.webhook_url is not None:
            await self._check_webhook(what.webhook_url)
        await self._files.check_room()
        await self._generator.charge(resolved)
        sources = job.sources = []
        try:
            for source in pixels:
                file = await asyncio.to_thread(codec.encode, source, Encoding())
                sources.append(self._files.new_name("png"))
                await self._files.save_as(sources[-1], file)
        except BaseException:  # the client may hang up
            await self._files.delete(sources)
            raise
        # If the client hangs up now, its job is stored all the same, or nothing of it is left.
        return await to_its_end(self._enqueue(job, request.start_within_s))

    async def _enqueue(self, job: Job, start_within_s: float | None) -> tuple[Job, bool]:
        sources = job.sources
        try:
            job, is_new = await self._store.submit(job, start_within_s)
        except (Busy, Conflict):  # after any other error the job may be stored all the same
            await self._files.delete(sources)
            raise
        if not is_new:
            await self._files.delete(sources)
        self._submitted.set()
        return job, is_new

    async def _check_webhook(self, url: str) -> None:
        if not WEBHOOK_URL.fullmatch(url):
            raise InvalidParameter("webhook_url", "must have at most 2048 characters of printable ASCII")
        try:
            await self._outbound.check(url)
        except OutboundError as error:
            raise InvalidParameter("webhook_url", error.problem) from error


def _fingerprint(what: Submission, pixels: tuple[Pixels, ...]) -> str:
    """Returns a digest that is equal for equal requests, whatever their drawn seeds and base URLs."""
    request = what.request
    asked = {name: getattr(request, name) for name in FINGERPRINTED}
    if pixels and request.size is None:
        asked["size"] = (pixels[0].shape[1], pixels[0].shape[0])
    encoding = vars(request.encoding)
    rest = (what.api, encoding, what.answer, what.priority, request.start_within_s, what.webhook_url)
    digest = hashlib.sha256(json.dumps([asked, *rest], sort_keys=True).encode())
    for source in pixels:
        digest.update(f"{source.shape}".encode())
        digest.update(source.tobytes())
    return digest.hexdigest()
