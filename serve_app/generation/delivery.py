"""Delivery of images to clients: as files behind URLs, or in the answer."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import Full, Gone
from serve_app.generation import codec
from serve_app.generation.events import GeneratedImage, ImageFacts, in_order
from serve_app.observability import metrics, telemetry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.generation.request import Encoding, GenerationRequest, ImageFormat


@dataclass(frozen=True, kw_only=True)
class ImageRecord(ImageFacts):
    """An image as a file. Jobs keep it; see `serve_app.jobs.records` for its stored form.

    Attributes:
        name: name of the file.
        bytes: size of the file.
        width: in pixels.
        height: in pixels.
    """

    name: str
    bytes: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """An image in an answer.

    Attributes:
        record: the image as a file.
        media_type: media type of the file.
        url: URL of the file; None if the answer contains the file.
        base64: the file, if the answer contains it.
    """

    record: ImageRecord
    media_type: str
    url: str | None = None
    base64: str | None = None

    @property
    def data_url(self) -> str:
        """The URL of the file, or a data URL (https://www.rfc-editor.org/rfc/rfc2397) that contains it."""
        return self.url or f"data:{self.media_type};base64,{self.base64}"


def record(image: GeneratedImage, name: str, size: int) -> ImageRecord:
    """Returns the record of an image whose file has this name and `size` bytes."""
    height, width, _ = image.pixels.shape
    return ImageRecord(name=name, bytes=size, width=width, height=height, **vars(image.facts))


class Delivery:
    """Makes images and puts them into answers.

    Args:
        generator: makes the images.
        files: keeps the files behind URLs.
    """

    def __init__(self, generator: Generator, files: FileStore) -> None:
        self._generator = generator
        self._files = files

    async def make(self, request: GenerationRequest, base: str | None) -> list[Delivered]:
        """Makes the images of a request while the client waits.

        Args:
            request: the request.
            base: base of the files' URLs; None to put the files into the answer.

        Raises:
            RequestError: see `Generator.admit` and `Generator.run`.
            Full: there is no room for files.
        """
        if base is not None:
            try:
                await self._files.check_room()
            except Full as error:
                advice = "Or request the images in the answer itself, if this API can: they need no room."
                raise Full(f"{error.message} {advice}", param="response_format") from error
        async with self._generator.admit(request) as running:
            async with aclosing(self._generator.run(running)) as events:
                made = in_order([event async for event in events if isinstance(event, GeneratedImage)])
            telemetry.note_images(made)
            model = running.request.model
            return await asyncio.gather(*(self._deliver(model, one, request.encoding, base) for one in made))

    async def _deliver(
        self, model: str, image: GeneratedImage, encoding: Encoding, base: str | None
    ) -> Delivered:
        with metrics.part(model, "encoding"):
            file = await asyncio.to_thread(codec.encode, image.pixels, encoding)
        media_type = f"image/{encoding.format}"
        if base is None:
            named = record(image, f"{image.facts.seed}.{encoding.format}", len(file))
            return Delivered(base64=await in_base64(file), media_type=media_type, record=named)
        with metrics.part(model, "storing"):
            name = await self._files.save(file, encoding.format)
        return Delivered(
            url=await self._files.url(base, name),
            media_type=media_type,
            record=record(image, name, len(file)),
        )

    async def kept(
        self, records: Iterable[ImageRecord], image_format: ImageFormat, base: str | None
    ) -> list[Delivered]:
        """Returns images that a job has kept.

        Args:
            records: the images.
            image_format: format of their files.
            base: base of the files' URLs; None to put the files into the answer.

        Raises:
            Gone: the answer is to contain the files, and they were deleted.
        """
        return [await self._kept(one, f"image/{image_format}", base) for one in records]

    async def _kept(self, image: ImageRecord, media_type: str, base: str | None) -> Delivered:
        if base is not None:
            url = await self._files.url(base, image.name)
            return Delivered(url=url, media_type=media_type, record=image)
        file = await self._files.read_all(image.name)
        if file is None:
            raise Gone(
                "The job's images were deleted; submit the request again with its seed to get the same.",
                code="result_gone",
            )
        return Delivered(base64=await in_base64(file), media_type=media_type, record=image)


async def in_base64(file: bytes) -> str:
    """Returns a file in base64, encoded in a thread: files have megabytes."""
    return (await asyncio.to_thread(base64.b64encode, file)).decode()
