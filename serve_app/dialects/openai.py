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
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile

from serve_app import images, telemetry
from serve_app.errors import InvalidParameter, RequestError, too_large
from serve_app.generation import (
    MAX_PARTIAL_IMAGES,
    MAX_SEED,
    GeneratedImage,
    Generation,
    PartialImage,
    StageProgress,
)
from serve_app.sse import BEGUN, Event, EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ModelConfig
    from deployments.types import Pixels
    from serve_app.config import Limits
    from serve_app.generation import Generator
    from serve_app.storage import FileStore

logger = logging.getLogger("ray.serve")

Told = PartialImage | GeneratedImage

MAX_ID_CHARS = 512
MAX_FILES = 16
"""OpenAI's own bound; what a model takes may be less."""
MAX_FIELDS = 64
STARTED = int(time.time())
OUR_NAMES_FOR = {"steps": "num_inference_steps", "sources": "image"}
"""Where this API's word for a parameter is not the server's own."""

Quality = Literal["low", "medium", "high", "xhigh", "max"]
QUALITIES: dict[str, tuple[Quality, int]] = {
    "low": ("low", 15),
    "medium": ("medium", 30),
    "standard": ("medium", 30),
    "high": ("high", 50),
    "hd": ("high", 50),
    "auto": ("high", 50),
    "xhigh": ("xhigh", 75),
    "max": ("max", 100),
}
"""What an answer calls it, where three of the words are not allowed, and its denoising steps."""
HINT = "A hint without an effect here."


class ImageRequest(BaseModel):
    """What generations and edits have in common. Null, an empty text and false mean unset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to paint. Put text that is to be rendered in quotation marks.")
    model: str | None = Field(default=None, description="A name from `/v1/models`; the first one if unset.")
    n: int | None = Field(
        default=None,
        description="How many images; image i has the seed `seed` + i; after the largest comes 0.",
    )
    size: str | None = Field(
        default=None, description="`WIDTHxHEIGHT` in pixels, or `auto`.", examples=["1024x1024"]
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None, description="`url` if unset; a stream is base64 whatever stands here, as OpenAI's is."
    )
    output_format: images.ImageFormat | None = Field(default=None, description="`png` if unset.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of JPEG and WebP, 0-100; 100 if unset."
    )
    quality: Literal["low", "medium", "standard", "high", "hd", "auto", "xhigh", "max"] | None = Field(
        default=None,
        description="Denoising steps, unless they are given: low 15; medium, standard 30; high, hd, auto 50; "
        "xhigh 75; max 100. The model's default if unset.",
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="Classifier-free guidance; off at 1 and below."
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Equal requests with equal seeds get equal images."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description=HINT)
    complexity: Literal["low", "medium", "high"] | None = Field(default=None, description=HINT)
    user: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    safety_identifier: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    stream: bool | None = Field(
        default=None, description="Whether images are sent as server-sent events, each when it is ready."
    )
    partial_images: int | None = Field(
        default=None, description=f"Previews of each image in a stream, 0 to {MAX_PARTIAL_IMAGES}."
    )


class GenerationRequest(ImageRequest):
    """The body of a generation."""

    moderation: Literal["auto", "low"] | None = Field(default=None, description=HINT)

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value  # JSON's 1.0 is 1
            for name, value in fields.items()
            if not (_may_be_unset(name, cls) and (value is None or value is False or value == ""))
        }


class EditRequest(ImageRequest):
    """The fields of an edit, beside its files."""

    input_fidelity: Literal["high", "low"] | None = Field(default=None, description=HINT)

    @field_validator("stream", mode="before")
    @classmethod
    def _true_or_false(cls, text: str) -> bool:
        if text != "true":  # false is unset already; pydantic would take yes and on, too
            raise PydanticCustomError("bool", "Input should be true or false")
        return True


class Image(BaseModel):
    """One image: where it is, or what it is."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str = Field(description="The prompt that was painted: the one that was sent.")
    seed: int = Field(description="Makes this image again, alone.")


class InputTokens(BaseModel):
    """What was read, by its kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prior stage, for all images together."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = Field(description="Drawn; beside those of the image a smaller one that leads to it.")
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer to generations and edits."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Image]
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Quality | None = Field(default=None, description="If the steps followed from it.")
    output_format: images.ImageFormat
    usage: Usage


class Error(BaseModel):
    """What is wrong, and what to do."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The parameter at fault.")
    code: str


class ErrorResponse(BaseModel):
    """The answer to a request that fails."""

    error: Error


class Model(BaseModel):
    """A model and what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str
    family: str
    editing: bool
    max_source_images: int
    sizes: Sizes
    defaults: Defaults
    lossy_options: list[str] = Field(description="Those in use that change pixels.")


class Sizes(BaseModel):
    """Which sides an image may have, in pixels."""

    min: int
    max: int
    multiple_of: int


class Defaults(BaseModel):
    """What is taken where a request leaves it out."""

    size: str
    num_inference_steps: int
    guidance_scale: float


class Models(BaseModel):
    """The models that there are."""

    object: Literal["list"] = "list"
    data: list[Model]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in this API's envelope for each status."""
    return {status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in statuses}


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
    generator: Generator, files: FileStore, link: Callable[[Request, str], str], limits: Limits
) -> APIRouter:
    """The routes of this API; `link` makes the URL of a stored file."""
    routes = APIRouter(prefix="/v1")
    # One image at a time: a hostile one takes hundreds of megabytes, and health has threads of its own.
    decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @routes.post(
        "/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=STREAM | errors(400, 404, 408, 413, 429, 500, 503, 504),
        openapi_extra=_body(
            "application/json",
            _schema(GenerationRequest, generator.models(), limits, unset=(None, "", False)),
            GENERATION_EXAMPLES,
        ),
    )
    async def generations(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise RequestError("Send this request as application/json.", code="invalid_content_type")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_json_bytes:
                raise too_large(limits.max_json_bytes)
        try:
            fields = GenerationRequest.model_validate_json(body)
        except ValidationError as error:
            raise _first_error(error) from None
        return await answer(request, fields, [], "image_generation")

    @routes.post(
        "/images/edits",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=STREAM | errors(400, 404, 408, 413, 429, 500, 503, 504),
        openapi_extra=_body("multipart/form-data", _edit_schema(generator.models(), limits)),
    )
    async def edits(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text and one to four images."""
        fields, uploads = await _read_form(request, limits)
        if not uploads:
            raise RequestError("Send at least one file as `image` or `image[]`.", param="image")
        return await answer(request, fields, uploads, "image_edit")

    async def answer(
        request: Request, fields: ImageRequest, uploads: list[bytes], kind: str
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
                where = {"url": link(request, await files.save(data, output_format))}
            return Image(revised_prompt=fields.prompt, seed=image.seed, **where)

        @asynccontextmanager
        async def admitted() -> AsyncIterator[Generation]:
            prepare = partial(with_sources, uploads) if uploads else None
            async with generator.admitted(generation, sources=len(uploads), prepare=prepare) as ready:
                telemetry.note_generation(request, ready, generator.model(ready.model))
                yield ready

        async def make(tell: Callable[[Any], None]) -> None:
            def report(told: StageProgress | Told) -> None:
                if not isinstance(told, StageProgress):
                    tell(told)

            async with admitted() as ready:
                tell(BEGUN)
                telemetry.note_images(request, await generator.run(ready, report))

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
            return await EventStream.begin(make, event, _error_event)
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

    async def with_sources(uploads: list[bytes], generation: Generation) -> Generation:
        loop, family = asyncio.get_running_loop(), generator.model(generation.model).traits
        decode = partial(images.decode_source, family=family, max_pixels=limits.max_source_pixels)
        sources = tuple([await loop.run_in_executor(decoding, decode, data) for data in uploads])
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


def _error_event(error: Exception) -> Event:
    if isinstance(error, RequestError | InvalidParameter):
        response = error_response(error)
    else:
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


async def _read_form(request: Request, limits: Limits) -> tuple[EditRequest, list[bytes]]:
    """The fields and the source images of a multipart body."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError("Send this request as multipart/form-data.", code="invalid_content_type")
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise _unknown(name)
                    if (value.size or 0) > limits.max_image_bytes:
                        raise RequestError(
                            f"The image is larger than the {limits.max_image_bytes} bytes allowed.",
                            param="image",
                            code="request_too_large",
                            status=413,
                        )
                    uploads.append(await value.read())
                elif name in ("image", "image[]"):
                    raise RequestError("image must be a file (with curl: -F image=@FILE).", param="image")
                elif name in texts:
                    raise RequestError(f"{name:.100} is given twice.", param=name[:100])
                elif not (_may_be_unset(name, EditRequest) and value in ("", "false")):
                    texts[name] = value
    except (ValueError, LookupError) as error:  # a charset that Starlette does not expect
        raise RequestError("The form cannot be decoded; send it as UTF-8.") from error
    try:
        return EditRequest.model_validate_strings(texts), uploads
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


UNSUPPORTED = {
    "negative_prompt": "the model has none; say in the prompt what the image is to show",
    "cfg_normalization": "the model has none; leave it out or false",
    "mask": "the model edits the whole image; say in the prompt what is to change",
    "markup": "the model edits the whole image; say in the prompt what is to change",
    "svg": "images are PNG, JPEG or WebP",
    "frame_count": "images do not move",
    "frame_duration_ms": "images do not move",
}


def _may_be_unset(name: str, fields: type[ImageRequest]) -> bool:
    return name != "prompt" and (name in fields.model_fields or name in UNSUPPORTED)


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


STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; a stream of events where `stream` is true.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "One event; its data is JSON.",
                    "required": ["event", "data"],
                    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                }
            }
        },
    }
}
GENERATION_EXAMPLES = {
    "shortest": {"value": {"prompt": "A red boat at dawn"}},
    "reproducible": {"value": {"prompt": "A red boat at dawn", "n": 2, "seed": 7, "output_format": "webp"}},
    "stream": {"value": {"prompt": "A red boat at dawn", "stream": True, "partial_images": 2}},
}


def _body(media_type: str, schema: dict[str, Any], examples: dict[str, Any] | None = None) -> dict[str, Any]:
    """For the OpenAPI document, what FastAPI cannot know: the routes parse bodies themselves."""
    content = {"schema": schema} | ({"examples": examples} if examples else {})
    return {"requestBody": {"required": True, "content": {media_type: content}}}


def _schema(
    fields: type[ImageRequest],
    models: list[ModelConfig],
    limits: Limits,
    *,
    unset: tuple[str | bool | None, ...],
) -> dict[str, Any]:
    """The schema of a body, with this server's own bounds."""
    schema = fields.model_json_schema()
    bounds: dict[str, dict[str, Any]] = {
        "model": {"enum": [model.name for model in models]},
        "n": {"minimum": 1, "maximum": limits.max_images},
        "size": {"pattern": f"^(auto|{_sizes(models, limits)})$"},
        "quality": {"enum": [word for word, (_, steps) in QUALITIES.items() if steps <= limits.max_steps]},
        "num_inference_steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance_scale": {"minimum": 0, "maximum": limits.max_guidance_scale},
        "partial_images": {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
    }
    for name, field in schema["properties"].items():
        if name == "prompt":
            field |= {"minLength": 1, "maxLength": limits.max_prompt_chars, "pattern": r"\S"}
        else:
            kind = field["anyOf"][0] | bounds.get(name, {})
            field["anyOf"] = [kind, {"enum": list(unset), "description": "Unset."}]
            del field["default"]
    schema["properties"] |= {
        name: {"enum": list(unset), "description": f"Not supported: {reason}."}
        for name, reason in UNSUPPORTED.items()
    }
    schema["allOf"] = [
        _either("output_compression", [100, *unset], "output_format", ["jpeg", "webp"]),
        _either("partial_images", [0, *unset], "stream", [True]),
    ]
    return schema


def _either(name: str, values: list[Any], other: str, others: list[Any]) -> dict[str, Any]:
    """One field has one of these values, or another field is there and has one of those."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": values}}},
            {"properties": {other: {"enum": others}}, "required": [other]},
        ]
    }


def _sizes(models: list[ModelConfig], limits: Limits) -> str:
    """A regular expression of the sizes that can be made, `WIDTHxHEIGHT`."""
    sides = sorted(
        {
            side
            for family in {model.traits for model in models}
            for side in range(family.min_side, family.max_side + 1, family.side_multiple)
        }
    )
    widths: dict[tuple[int, ...], list[int]] = {}
    for width in sides:
        heights = tuple(height for height in sides if width * height <= limits.max_pixels)
        if heights:
            widths.setdefault(heights, []).append(width)
    return "|".join(
        f"({'|'.join(map(str, several))})x({'|'.join(map(str, heights))})"
        for heights, several in widths.items()
    )


def _edit_schema(models: list[ModelConfig], limits: Limits) -> dict[str, Any]:
    schema = _schema(EditRequest, models, limits, unset=("", False))
    schema["properties"]["image"] = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "maxItems": max(model.traits.max_sources for model in models),
        "description": "PNG, JPEG or WebP; also as `image[]`.",
    }
    schema["required"].append("image")
    return schema
