"""Makes what was ordered and hands it out: as files behind URLs, or as the files themselves."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.errors import NO_RETRY, InvalidParameter, RequestError
from serve_app.generation import images
from serve_app.observability import metrics, telemetry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.generation.images import Encoding
    from serve_app.generation.orders import Order
    from serve_app.generation.request import GeneratedImage, Report
    from serve_app.http.links import Links
    from serve_app.jobs.store import Job


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """An image on its way to the client.

    Attributes:
        url: where it is, or None if it is sent along.
        base64: the file that is sent along.
        media_type: of the file.
        facts: what is known of it, see `described`.
    """

    url: str | None = None
    base64: str | None = None
    media_type: str
    facts: Mapping[str, Any]

    @property
    def is_flagged(self) -> bool:
        """Whether the safety checker has found something."""
        return (self.facts["risk"] or 0) >= 1

    @property
    def data_url(self) -> str:
        """Where it is or, by https://www.rfc-editor.org/rfc/rfc2397, what it is."""
        return self.url or f"data:{self.media_type};base64,{self.base64}"


def described(image: GeneratedImage, name: str, size: int) -> dict[str, Any]:
    """What is known of an image whose file has this name and so many bytes: all but its pixels."""
    height, width, _ = image.pixels.shape
    facts = {name: value for name, value in vars(image).items() if name != "pixels"}
    return {"name": name, "bytes": size, "width": width, "height": height} | facts


def failure(error: RequestError | InvalidParameter) -> dict[str, Any]:
    """An error as a job keeps it."""
    if isinstance(error, InvalidParameter):
        return {"status": 400, "code": error.code, "param": error.param, "problem": error.problem}
    return {"status": error.status, "code": error.code, "param": error.param, "message": error.message}


def error_of(failure: Mapping[str, Any]) -> RequestError | InvalidParameter:
    """The error again, which no other try to fetch the job changes."""
    if "problem" in failure:
        return InvalidParameter(failure["param"], failure["problem"], code=failure["code"])
    return RequestError(**failure, headers=NO_RETRY)


class Delivery:
    """The way of images to the client.

    Args:
        generator: makes them.
        files: keeps those that are not sent along.
        links: to those.
    """

    def __init__(self, generator: Generator, files: FileStore, links: Links) -> None:
        self._generator = generator
        self._files = files
        self._links = links

    async def make(
        self, request: Request, order: Order, *, inline: bool, report: Report = lambda _: None
    ) -> list[Delivered]:
        """Make the images now, while the client waits.

        Args:
            request: the client's.
            order: what it is for.
            inline: whether the images are sent along.
            report: see `Generator.run`.

        Raises:
            RequestError: see `Generator.admitted` and `Generator.run`; 507, there is no room for files.
            InvalidParameter: likewise.
        """
        if not inline:
            await self._files.check_room()
        base = None if inline else self._links.base(request)
        async with self._generator.admitted(
            order.generation, sources=order.sources, prepare=order.prepare
        ) as ready:
            telemetry.note_generation(request, ready)
            made = await self._generator.run(ready, report)
            telemetry.note_images(request, made)
            return await asyncio.gather(
                *(self._new(ready.model, image, order.encoding, base) for image in made)
            )

    async def _new(
        self, model: str, image: GeneratedImage, encoding: Encoding, base: str | None
    ) -> Delivered:
        with metrics.part(model, "encoding"):
            data = await asyncio.to_thread(images.encode, image.pixels, encoding)
        media_type = f"image/{encoding.format}"
        if base is None:
            facts = described(image, f"{image.seed}.{encoding.format}", len(data))
            return Delivered(base64=await _text(data), media_type=media_type, facts=facts)
        with metrics.part(model, "storing"):
            name = await self._files.save(data, encoding.format)
        url = await self._links.file(base, name)
        return Delivered(url=url, media_type=media_type, facts=described(image, name, len(data)))

    async def of(self, job: Job, base: str, *, inline: bool) -> list[Delivered]:
        """The images of a job that has succeeded.

        Args:
            job: whose.
            base: below which URLs are to be.
            inline: whether the images are sent along.

        Raises:
            RequestError: 410, they are to be sent along and are gone.
        """
        return [await self._kept(job, facts, base, inline=inline) for facts in job.images]

    async def _kept(self, job: Job, facts: dict[str, Any], base: str, *, inline: bool) -> Delivered:
        media_type = f"image/{job.encoding['format']}"
        facts = {"prompt": job.request["prompt"], "risk": None} | facts  # of older versions' jobs
        if not inline:
            url = await self._links.file(base, facts["name"])
            return Delivered(url=url, media_type=media_type, facts=facts)
        data = await self._files.read(facts["name"], 0, facts["bytes"])
        if data is None:
            raise RequestError("The job's images are not kept any more.", code="result_gone", status=410)
        return Delivered(base64=await _text(data), media_type=media_type, facts=facts)


async def _text(data: bytes) -> str:
    """Megabytes in base64, beside the event loop."""
    return (await asyncio.to_thread(base64.b64encode, data)).decode()
