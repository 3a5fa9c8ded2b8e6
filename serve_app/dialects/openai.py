"""The OpenAI image API: https://platform.openai.com/docs/api-reference/images.

`num_inference_steps`, `guidance_scale` and `seed` are this server's own, sent by the official clients
through `extra_body`. A field that is not honoured is refused, by name.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from serve_app import images
from serve_app.errors import InvalidParameter, RequestError, too_large
from serve_app.generation import MAX_SEED, Generation

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from serve_app.generation import GeneratedImage, Generator
    from serve_app.storage import FileStore

MAX_JSON_BYTES = 2**20
"""Several times what the longest prompt takes, escaped; parsing holds up the event loop."""

STARTED = int(time.time())
OUR_NAMES_FOR = {"steps": "num_inference_steps", "sources": "image"}
"""Where this API's word for a parameter is not the server's own."""


class ImageRequest(BaseModel):
    """What generations and edits have in common. Null means unset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to paint. Put text that is to be rendered in quotation marks.")
    model: str | None = Field(default=None, description="A name from `/v1/models`; the first one if unset.")
    n: int | None = Field(default=None, description="How many images; image i has the seed `seed` + i.")
    size: str | None = Field(
        default=None, description="`WIDTHxHEIGHT` in pixels, or `auto`.", examples=["1024x1024"]
    )
    response_format: Literal["url", "b64_json"] | None = Field(default=None, description="`url` if unset.")
    output_format: images.ImageFormat | None = Field(default=None, description="`png` if unset.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of JPEG and WebP, 0-100; 100 if unset."
    )
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="Classifier-free guidance; off at 1 and below."
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Equal requests with equal seeds get equal images."
    )


class Image(BaseModel):
    """One image: where it is, or what it is."""

    url: str | None = None
    b64_json: str | None = None
    seed: int = Field(description="Makes this image again, alone.")


class ImagesResponse(BaseModel):
    """The answer to generations and edits."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Image]
    size: str
    output_format: images.ImageFormat


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


def router(generator: Generator, files: FileStore, link: Callable[[Request, str], str]) -> APIRouter:
    """The routes of this API; `link` makes the URL of a stored file."""
    routes = APIRouter(prefix="/v1")
    # One image at a time: a hostile one takes hundreds of megabytes, and health has threads of its own.
    decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    @routes.post(
        "/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        openapi_extra=_body("application/json", ImageRequest.model_json_schema()),
    )
    async def generations(request: Request) -> ImagesResponse:
        """Make images from text."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise RequestError("Send this request as application/json.", code="invalid_content_type")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_JSON_BYTES:
                raise too_large(MAX_JSON_BYTES)
        try:
            fields = ImageRequest.model_validate_json(body)
        except ValidationError as error:
            raise _first_error(error) from None
        return await answer(request, fields, [])

    @routes.post(
        "/images/edits",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        openapi_extra=_body("multipart/form-data", _edit_schema()),
    )
    async def edits(request: Request) -> ImagesResponse:
        """Make images from text and one to four images."""
        fields, uploads = await _read_form(request)
        if not uploads:
            raise RequestError("Send at least one file as `image` or `image[]`.", param="image")
        return await answer(request, fields, uploads)

    async def answer(request: Request, fields: ImageRequest, uploads: list[bytes]) -> ImagesResponse:
        output_format = fields.output_format or "png"
        quality = 100 if fields.output_compression is None else fields.output_compression
        if output_format == "png" and quality < 100:
            raise RequestError("PNG is lossless; choose jpeg or webp.", param="output_compression")
        generation = Generation(
            model=fields.model,
            prompt=fields.prompt,
            size=_size(fields.size),
            n=1 if fields.n is None else fields.n,
            steps=fields.num_inference_steps,
            guidance_scale=fields.guidance_scale,
            seed=fields.seed,
        )

        async def deliver(image: GeneratedImage) -> Image:
            data = await asyncio.to_thread(images.encode, image.pixels, output_format, quality)
            if fields.response_format == "b64_json":
                return Image(b64_json=base64.b64encode(data).decode(), seed=image.seed)
            return Image(url=link(request, await files.save(data, output_format)), seed=image.seed)

        async with generator.admitted(generation, sources=len(uploads)):
            if uploads:
                generation = await with_sources(generation, uploads)
            made = await generator.run(generation)
            height, width, _ = made[0].pixels.shape
            return ImagesResponse(
                created=int(time.time()),
                data=await asyncio.gather(*(deliver(image) for image in made)),
                size=f"{width}x{height}",
                output_format=output_format,
            )

    async def with_sources(generation: Generation, uploads: list[bytes]) -> Generation:
        loop, family = asyncio.get_running_loop(), generator.model(generation.model).traits
        sources = tuple(
            [await loop.run_in_executor(decoding, images.decode_source, data, family) for data in uploads]
        )
        height, width, _ = sources[0].shape
        return replace(generation, sources=sources, size=generation.size or (width, height))

    @routes.api_route("/models", methods=["GET", "HEAD"])
    async def list_models() -> dict[str, Any]:
        """The models that this server offers; the first one is the default."""
        return {"object": "list", "data": [_describe(model) for model in generator.models()]}

    @routes.api_route("/models/{name}", methods=["GET", "HEAD"])
    async def get_model(name: str) -> dict[str, Any]:
        """One model and what it can do."""
        return _describe(generator.model(name))

    return routes


def _describe(model: ModelConfig) -> dict[str, Any]:
    family, defaults = model.traits, model.defaults
    return {
        "id": model.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "glm-image-server",
        "family": model.family,
        "sizes": {"min": family.min_side, "max": family.max_side, "multiple_of": family.side_multiple},
        "max_source_images": family.max_sources,
        "defaults": {
            "size": f"{defaults.width}x{defaults.height}",
            "num_inference_steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale,
        },
        "lossy_options": model.decoder.acceleration.lossy,
    }


async def _read_form(request: Request) -> tuple[ImageRequest, list[bytes]]:
    """The fields and the source images of a multipart body. An empty field counts as unset."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError("Send this request as multipart/form-data.", code="invalid_content_type")
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    try:
        async with request.form() as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in ("image", "image[]"):
                        raise _unknown(name)
                    uploads.append(await value.read())
                elif name in ("image", "image[]"):
                    raise RequestError("image must be a file (with curl: -F image=@FILE).", param="image")
                elif name in texts:
                    raise RequestError(f"{name:.100} is given twice.", param=name[:100])
                elif value or name == "prompt":
                    texts[name] = value
    except (ValueError, LookupError) as error:  # a charset that Starlette does not expect
        raise RequestError("The form cannot be decoded; send it as UTF-8.") from error
    try:
        return ImageRequest.model_validate_strings(texts), uploads
    except ValidationError as error:
        raise _first_error(error) from None


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
    return RequestError(
        f"The parameter {param!r:.100} is not supported.", param=param[:100], code="unknown_parameter"
    )


def _envelope(status: int, message: str, param: str | None, code: str) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The request body for the OpenAPI document; the routes parse it themselves."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _edit_schema() -> dict[str, Any]:
    schema = ImageRequest.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"]["image"] = {
        "type": "array",
        "items": file,
        "description": "PNG, JPEG or WebP; also as `image[]`.",
    }
    schema["required"].append("image")
    return schema
