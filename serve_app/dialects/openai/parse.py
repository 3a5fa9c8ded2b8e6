"""Requests in the OpenAI image API's words, read and put into this server's own."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile

from serve_app.dialects.bodies import MAX_FIELDS, first_error, parsed_size, read_json, request_id, unknown
from serve_app.dialects.openai.schemas import MAX_FILES, QUALITIES, ImageRequest, Quality
from serve_app.errors import InvalidParameter, RequestError, image_too_large
from serve_app.generation.images import Encoding
from serve_app.generation.orders import Order
from serve_app.generation.request import Generation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from fastapi import Request

    from serve_app.config import Limits
    from serve_app.generation.generator import Generator
    from serve_app.generation.sources import SourceReader

Fields = TypeVar("Fields", bound=ImageRequest)


@dataclass(frozen=True, kw_only=True)
class Asked(Generic[Fields]):
    """A request that was read.

    Attributes:
        fields: as they came.
        order: what they ask for.
        quality: what the steps followed from, if they did.
        sources_param: what the request calls them.
    """

    fields: Fields
    order: Order
    quality: Quality | None
    sources_param: str = "image"

    @contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Within the block, errors call the source images what the request does.

        Raises:
            RequestError: instead of an `InvalidParameter` of theirs.
        """
        try:
            yield
        except InvalidParameter as error:
            if error.param != "sources":
                raise
            param = self.sources_param
            raise RequestError(f"{param} {error.problem}.", param=param, code=error.code) from error


class RequestReader:
    """Reads the bodies of generations and edits.

    Args:
        generator: knows the models.
        reader: gets and decodes source images.
        limits: what a request may ask for.
    """

    def __init__(self, generator: Generator, reader: SourceReader, limits: Limits) -> None:
        self._generator = generator
        self._reader = reader
        self._limits = limits

    async def json(
        self, request: Request, fields_type: type[Fields], max_bytes: int | None = None
    ) -> Asked[Fields]:
        """A JSON body, of an edit if it has `images`.

        Raises:
            RequestError: it cannot be read, or is not valid.
        """
        fields = await read_json(request, fields_type, max_bytes or self._limits.max_json_bytes)
        urls = [image.image_url for image in getattr(fields, "images", None) or ()]

        async def fetched() -> list[bytes]:
            return [await self._reader.read(url) for url in urls]

        return self._asked(request, fields, "images", len(urls), fetched)

    async def form(self, request: Request, fields_type: type[Fields]) -> Asked[Fields]:
        """An edit's form with files.

        Raises:
            RequestError: it cannot be read, or is not valid.
        """
        fields, uploads = await _read_form(request, fields_type, self._limits)
        if not uploads:
            raise RequestError("Send at least one file as `image` or `image[]`.", param="image")

        async def uploaded() -> list[bytes]:
            return uploads

        return self._asked(request, fields, "image", len(uploads), uploaded)

    def _asked(
        self,
        request: Request,
        fields: Fields,
        sources_param: str,
        sources: int,
        read: Callable[[], Awaitable[list[bytes]]],
    ) -> Asked[Fields]:
        compression = 100 if fields.output_compression is None else fields.output_compression
        encoding = Encoding(fields.output_format or "png", compression)
        if encoding.format == "png" and compression < 100:
            raise RequestError("PNG is lossless; choose jpeg or webp.", param="output_compression")
        steps, quality = fields.num_inference_steps, None
        if steps is None and fields.quality:
            quality, steps = QUALITIES[fields.quality]
            if steps > self._limits.max_steps:
                raise RequestError(
                    f"{fields.quality} takes {steps} denoising steps, and {self._limits.max_steps} are "
                    "allowed.",
                    param="quality",
                )
        generation = Generation(
            model=fields.model,
            prompt=fields.prompt,
            size=None if fields.size in (None, "auto") else parsed_size(fields.size, "or as auto"),
            n=1 if fields.n is None else fields.n,
            steps=steps,
            guidance_scale=fields.guidance_scale,
            negative_prompt=fields.negative_prompt,
            cfg_normalization=fields.cfg_normalization,
            strength=fields.strength,
            seed=fields.seed,
            partial_images=fields.partial_images or 0,
            expand_prompt=fields.enable_prompt_expansion or False,
            moderation=getattr(fields, "moderation", None) or "auto",
            api="openai",
            request_id=request_id(request),
            key_id=request.state.key_id,
        )

        async def prepare(generation: Generation) -> Generation:
            family = self._generator.model(generation.model).traits
            return await self._reader.add(generation, await read(), family)

        order = Order(
            generation=generation,
            encoding=encoding,
            sources=sources,
            prepare=prepare if sources else None,
        )
        return Asked(fields=fields, order=order, quality=quality, sources_param=sources_param)


async def _read_form(request: Request, fields: type[Fields], limits: Limits) -> tuple[Fields, list[bytes]]:
    """The fields and the source images of a multipart body."""
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise unknown(name, fields)
                    if (value.size or 0) > limits.max_image_bytes:
                        raise image_too_large(limits.max_image_bytes)
                    uploads.append(await value.read())
                elif name in ("image", "image[]"):
                    raise RequestError("image must be a file (with curl: -F image=@FILE).", param="image")
                elif name in texts:
                    raise RequestError(f"{name:.100} is given twice.", param=name[:100])
                elif not (fields.may_be_unset(name) and value in ("", "false")):
                    texts[name] = value.replace("\r\n", "\n")  # as which browsers send the ends of lines
    except (ValueError, LookupError) as error:  # a charset that Starlette does not expect
        raise RequestError("The form cannot be decoded; send it as UTF-8.") from error
    try:
        return fields.model_validate_strings(texts), uploads
    except ValidationError as error:
        raise first_error(error, fields) from None
