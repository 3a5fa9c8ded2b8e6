"""The OpenAI image API: https://platform.openai.com/docs/api-reference/images.

`num_inference_steps`, `guidance_scale` and `seed` are this server's own, sent by the official clients
through `extra_body`. A field that is not honoured is refused, by name.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from serve_app import images, telemetry
from serve_app.dialects.openai_schemas import (
    ANSWERS,
    MAX_FIELDS,
    MAX_FILES,
    MAX_ID_CHARS,
    QUALITIES,
    UNSUPPORTED,
    Defaults,
    EditByReference,
    EditForm,
    GenerationRequest,
    Image,
    ImageRequest,
    ImagesResponse,
    InputTokens,
    Model,
    Models,
    Sizes,
    Usage,
    edit_body,
    errors,
    generation_body,
    may_be_unset,
)
from serve_app.errors import InvalidParameter, RequestError, image_too_large, too_large
from serve_app.generation import GeneratedImage, Generation, PartialImage, StageProgress
from serve_app.sse import BEGUN, AllSent, Event, EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from deployments.config import ModelConfig
    from deployments.types import Pixels
    from serve_app.config import Limits
    from serve_app.generation import Generator
    from serve_app.sources import SourceReader
    from serve_app.storage import FileStore

logger = logging.getLogger("ray.serve")

Told = PartialImage | GeneratedImage
Fields = TypeVar("Fields", bound=ImageRequest)

STARTED = int(time.time())
OUR_NAMES_FOR = {"steps": "num_inference_steps", "sources": "image"}
"""Where this API's word for a parameter is not the server's own."""


def error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in this API's envelope."""
    if isinstance(error, InvalidParameter):
        param = OUR_NAMES_FOR.get(error.param, error.param)
        return _envelope(400, f"{param} {error.problem}.", param, error.code)
    response = _envelope(error.status, error.message, error.param, error.code)
    response.headers.update(error.headers)
    return response


def server_error_response() -> JSONResponse:
    """The envelope for faults of the server, which are not the client's to know."""
    return _envelope(500, "The server failed to answer; its log says why.", None, "server_error")


def router(
    generator: Generator,
    files: FileStore,
    reader: SourceReader,
    link: Callable[[Request, str], Awaitable[str]],
    limits: Limits,
) -> APIRouter:
    """The routes of this API; `link` makes the URL of a stored file."""
    routes = APIRouter(prefix="/v1")
    # One image at a time: a hostile one takes hundreds of megabytes; and nothing else waits for it.
    decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @routes.post(
        "/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=generation_body(generator.models(), limits),
    )
    async def generations(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text."""
        fields = await _read_json(request, GenerationRequest, limits.max_json_bytes)
        return await answer(request, fields, "image_generation")

    @routes.post(
        "/images/edits",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=edit_body(generator.models(), limits),
    )
    async def edits(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text and one to four images: a form with files, or JSON with URLs."""
        if _media_type(request) == "application/json":
            by_reference = await _read_json(request, EditByReference, limits.max_body_bytes)
            urls = [image.image_url for image in by_reference.images]

            async def fetched() -> list[bytes]:
                return [await reader.read(url) for url in urls]

            try:
                return await answer(request, by_reference, "image_edit", sources=len(urls), read=fetched)
            except InvalidParameter as error:
                if error.param != "sources":
                    raise
                raise RequestError(f"images {error.problem}.", param="images", code=error.code) from error
        fields, uploads = await _read_form(request, limits)
        if not uploads:
            raise RequestError("Send at least one file as `image` or `image[]`.", param="image")

        async def uploaded() -> list[bytes]:
            return uploads

        return await answer(request, fields, "image_edit", sources=len(uploads), read=uploaded)

    async def answer(
        request: Request,
        fields: ImageRequest,
        kind: str,
        *,
        sources: int = 0,
        read: Callable[[], Awaitable[list[bytes]]] | None = None,
    ) -> ImagesResponse | EventStream[Told]:
        output_format = fields.output_format or "png"
        compression = 100 if fields.output_compression is None else fields.output_compression
        if output_format == "png" and compression < 100:
            raise RequestError("PNG is lossless; choose jpeg or webp.", param="output_compression")
        steps, quality = fields.num_inference_steps, None
        if steps is None and fields.quality:
            quality, steps = QUALITIES[fields.quality]
            if steps > limits.max_steps:
                raise RequestError(
                    f"{fields.quality} takes {steps} denoising steps, and {limits.max_steps} are allowed.",
                    param="quality",
                )
        generation = Generation(
            model=fields.model,
            prompt=fields.prompt,
            size=_size(fields.size),
            n=1 if fields.n is None else fields.n,
            steps=steps,
            guidance_scale=fields.guidance_scale,
            seed=fields.seed,
            partial_images=fields.partial_images or 0,
            request_id=_request_id(request),
            key_id=request.state.key_id,
        )
        if fields.partial_images and not fields.stream:
            raise RequestError("Previews come in a stream only: set stream to true.", param="partial_images")

        async def encode(pixels: Pixels) -> bytes:
            return await asyncio.to_thread(images.encode, pixels, output_format, compression)

        async def deliver(image: GeneratedImage) -> Image:
            data = await encode(image.pixels)
            if fields.response_format == "b64_json":
                where = {"b64_json": base64.b64encode(data).decode()}
            else:
                where = {"url": await link(request, await files.save(data, output_format))}
            return Image(revised_prompt=fields.prompt, seed=image.seed, **where)

        @asynccontextmanager
        async def admitted() -> AsyncIterator[Generation]:
            prepare = partial(with_sources, read) if read else None
            async with generator.admitted(generation, sources=sources, prepare=prepare) as ready:
                telemetry.note_generation(request, ready, generator.model(ready.model))
                yield ready

        async def make(tell: Callable[[Any], None], all_sent: AllSent) -> None:
            def report(told: StageProgress | Told) -> None:
                if not isinstance(told, StageProgress):
                    tell(told)

            async with admitted() as ready:
                tell(BEGUN)
                telemetry.note_images(request, await generator.run(ready, report))
                await all_sent()  # the place is taken, and the server not drained, until then

        async def event(told: Told) -> Event:
            height, width, _ = told.pixels.shape
            data = {
                "b64_json": base64.b64encode(await encode(told.pixels)).decode(),
                "created_at": int(time.time()),
                "size": f"{width}x{height}",
                "quality": quality or "auto",
                "background": "opaque",
                "output_format": output_format,
            }
            if isinstance(told, PartialImage):
                return _event(f"{kind}.partial_image", data | {"partial_image_index": told.index})
            return _event(
                f"{kind}.completed", data | {"seed": told.seed, "usage": _usage([told]).model_dump()}
            )

        if fields.stream:
            return await EventStream.begin(make, event, partial(_error_event, request))
        if fields.response_format != "b64_json":
            await files.check_room()
        async with admitted() as ready:
            made = await generator.run(ready)
            telemetry.note_images(request, made)
            height, width, _ = made[0].pixels.shape
            return ImagesResponse(
                created=int(time.time()),
                data=await asyncio.gather(*(deliver(image) for image in made)),
                size=f"{width}x{height}",
                quality=quality,
                output_format=output_format,
                usage=_usage(made),
            )

    async def with_sources(read: Callable[[], Awaitable[list[bytes]]], generation: Generation) -> Generation:
        loop, family = asyncio.get_running_loop(), generator.model(generation.model).traits
        decode = partial(images.decode_source, family=family, max_pixels=limits.max_source_pixels)
        uploads = await read()
        sources = tuple([await loop.run_in_executor(decoding, decode, data) for data in uploads])
        uploads.clear()  # what they were decoded from is not to be held while the images are made
        height, width, _ = sources[0].shape
        return replace(generation, sources=sources, size=generation.size or (width, height))

    @routes.get("/models")
    async def list_models() -> Models:
        """The models that this server offers; the first one is the default."""
        return Models(data=[_describe(model) for model in generator.models()])

    @routes.get("/models/{name}", responses=errors(404))
    async def get_model(name: str) -> Model:
        """One model and what it can do."""
        return _describe(generator.model(name))

    return routes


def _event(kind: str, data: dict[str, Any]) -> Event:
    return kind, {"type": kind} | data


def _error_event(request: Request, error: Exception) -> Event:
    if isinstance(error, RequestError | InvalidParameter):
        telemetry.note_error(request, error.code)
        response = error_response(error)
    else:
        telemetry.note_error(request, "server_error")
        logger.error("a stream failed", exc_info=error)
        response = server_error_response()
    return "error", json.loads(bytes(response.body))


def _usage(made: list[GeneratedImage]) -> Usage:
    text = sum(image.text_tokens for image in made)
    source = sum(image.source_tokens for image in made)
    drawn = sum(image.drawn_tokens for image in made)
    return Usage(
        input_tokens=text + source,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=source),
        output_tokens=drawn,
        total_tokens=text + source + drawn,
    )


def _describe(model: ModelConfig) -> Model:
    family, defaults = model.traits, model.defaults
    return Model(
        id=model.name,
        created=STARTED,
        owned_by="glm-image-server",
        family=model.family,
        editing=family.max_sources > 0,
        max_source_images=family.max_sources,
        sizes=Sizes(min=family.min_side, max=family.max_side, multiple_of=family.side_multiple),
        defaults=Defaults(
            size=f"{defaults.width}x{defaults.height}",
            num_inference_steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
        ),
        lossy_options=model.decoder.acceleration.lossy,
    )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_json(request: Request, fields: type[Fields], max_bytes: int) -> Fields:
    """The fields of a JSON body."""
    if _media_type(request) != "application/json":
        raise RequestError("Send this request as application/json.", code="invalid_content_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    try:
        return await asyncio.to_thread(fields.model_validate_json, body)
    except ValidationError as error:
        raise _first_error(error) from None


async def _read_form(request: Request, limits: Limits) -> tuple[EditForm, list[bytes]]:
    """The fields and the source images of a multipart body."""
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise _unknown(name)
                    if (value.size or 0) > limits.max_image_bytes:
                        raise image_too_large(limits.max_image_bytes)
                    uploads.append(await value.read())
                elif name in ("image", "image[]"):
                    raise RequestError("image must be a file (with curl: -F image=@FILE).", param="image")
                elif name in texts:
                    raise RequestError(f"{name:.100} is given twice.", param=name[:100])
                elif not (may_be_unset(name, EditForm) and value in ("", "false")):
                    texts[name] = value
    except (ValueError, LookupError) as error:  # a charset that Starlette does not expect
        raise RequestError("The form cannot be decoded; send it as UTF-8.") from error
    try:
        return EditForm.model_validate_strings(texts), uploads
    except ValidationError as error:
        raise _first_error(error) from None


def _request_id(request: Request) -> str:
    """The client's, or else the one that Serve has made; Serve sends it back."""
    request_id = request.headers.get("x-request-id", "")
    if len(request_id) > MAX_ID_CHARS:
        raise RequestError(f"X-Request-ID may have {MAX_ID_CHARS} characters.", param="X-Request-ID")
    return request_id


def _size(size: str | None) -> tuple[int, int] | None:
    if size in (None, "auto"):
        return None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if match is None:
        raise RequestError("Give the size as WIDTHxHEIGHT, 1024x1024 say, or as auto.", param="size")
    return int(match[1]), int(match[2])


def _first_error(error: ValidationError) -> RequestError:
    """What pydantic found first; its messages never repeat the value."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return _unknown(str(param))
    if first["type"] == "missing":
        return RequestError(f"{param} is required.", param=param, code="missing_required_parameter")
    return RequestError(f"{param or 'The JSON body'}: {first['msg']}.", param=param)


def _unknown(param: str) -> RequestError:
    name = param.partition("[")[0]  # a form's svg[model]
    reason = f": {UNSUPPORTED[name]}" if name in UNSUPPORTED else ""
    return RequestError(
        f"The parameter {param!r:.100} is not supported{reason}.",
        param=param[:100],
        code="unsupported_parameter" if reason else "unknown_parameter",
    )


def _envelope(status: int, message: str, param: str | None, code: str) -> JSONResponse:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)
