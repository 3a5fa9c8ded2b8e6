"""The OpenAI image API: https://platform.openai.com/docs/api-reference/images.

`num_inference_steps`, `guidance_scale` and `seed` are this server's own, sent by the official clients
through `extra_body`. A field that is not honoured is refused, by name.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from deployments.families import PARAMETERS
from deployments.observability.log import FAULT
from serve_app.dialects.bodies import media_type
from serve_app.dialects.openai.schemas import (
    ANSWERS,
    HINT,
    Bounds,
    Defaults,
    EditByReference,
    EditForm,
    Error,
    GenerationRequest,
    ImageRequest,
    ImagesResponse,
    Model,
    Models,
    Sizes,
    edit_body,
    error_type,
    errors,
    generation_body,
    images_response,
    usage,
)
from serve_app.errors import InvalidParameter, RequestError, in_words, server_error
from serve_app.generation import images
from serve_app.generation.request import GeneratedImage, PartialImage, StageProgress
from serve_app.http.sse import BEGUN, AllSent, Event, EventStream
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.dialects.openai.parse import Asked, RequestReader
    from serve_app.generation.delivery import Delivery
    from serve_app.generation.generator import Generator

logger = logging.getLogger("ray.serve")

Told = PartialImage | GeneratedImage
Fields = TypeVar("Fields", bound=ImageRequest)

STARTED = int(time.time())
OUR_NAMES_FOR = {
    "steps": "num_inference_steps",
    "sources": "image",
    "expand_prompt": "enable_prompt_expansion",
}
"""Where this API's word for a parameter is not the server's own."""


def error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in this API's envelope."""
    error = in_words(error, OUR_NAMES_FOR)
    return JSONResponse({"error": vars(error_body(error))}, error.status, error.headers)


def error_body(error: RequestError | InvalidParameter) -> Error:
    """What of an error is in the envelope."""
    error = in_words(error, OUR_NAMES_FOR)
    return Error(message=error.message, type=error_type(error.status), param=error.param, code=error.code)


def router(generator: Generator, delivery: Delivery, reader: RequestReader, limits: Limits) -> APIRouter:
    """The routes of this API."""
    routes = APIRouter(prefix="/v1")

    @routes.post(
        "/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=generation_body(generator, limits),
    )
    async def generations(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text."""
        return await answer(request, await reader.json(request, GenerationRequest), "image_generation")

    @routes.post(
        "/images/edits",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=edit_body(generator, limits),
    )
    async def edits(request: Request) -> ImagesResponse | EventStream[Told]:
        """Make images from text and one to four images: a form with files, or JSON with URLs."""
        asked: Asked[EditByReference] | Asked[EditForm]
        if media_type(request) == "application/json":
            asked = await reader.json(request, EditByReference, limits.max_body_bytes)
        else:
            asked = await reader.form(request, EditForm)
        with asked.naming_sources():
            return await answer(request, asked, "image_edit")

    async def answer(request: Request, asked: Asked[Any], kind: str) -> ImagesResponse | EventStream[Told]:
        fields, order = asked.fields, asked.order
        if fields.partial_images and not fields.stream:
            raise RequestError("Previews come in a stream only: set stream to true.", param="partial_images")

        async def make(tell: Callable[[Any], None], all_sent: AllSent) -> None:
            def report(told: StageProgress | Told) -> None:
                if not isinstance(told, StageProgress):
                    tell(told)

            async with generator.admitted(
                order.generation, sources=order.sources, prepare=order.prepare
            ) as ready:
                telemetry.note_generation(request, ready)
                tell(BEGUN)
                telemetry.note_images(request, await generator.run(ready, report))
                await all_sent()  # the place is taken, and the server not drained, until then

        async def event(told: Told) -> Event:
            height, width, _ = told.pixels.shape
            file = await asyncio.to_thread(images.encode, told.pixels, order.encoding)
            data = {
                "b64_json": base64.b64encode(file).decode(),
                "created_at": int(time.time()),
                "size": f"{width}x{height}",
                "quality": asked.quality or "auto",
                "background": "opaque",
                "output_format": order.encoding.format,
            }
            if isinstance(told, PartialImage):
                return _event(f"{kind}.partial_image", data | {"partial_image_index": told.index})
            return _event(
                f"{kind}.completed", data | {"seed": told.seed, "usage": usage([vars(told)]).model_dump()}
            )

        if fields.stream:
            return await EventStream.begin(make, event, partial(_error_event, request))
        made = await delivery.make(request, order, inline=fields.response_format == "b64_json")
        return images_response(made, asked.quality, order.encoding.format, time.time())

    @routes.get("/models")
    async def list_models() -> Models:
        """The models that this server offers; the first one is the default."""
        return Models(data=[_describe(generator, limits, model) for model in generator.models()])

    @routes.get("/models/{name}", responses=errors(404))
    async def get_model(name: str) -> Model:
        """One model and what it can do."""
        return _describe(generator, limits, generator.model(name))

    return routes


def _event(kind: str, data: dict[str, Any]) -> Event:
    return kind, {"type": kind} | data


def _error_event(request: Request, error: Exception) -> Event:
    if isinstance(error, RequestError | InvalidParameter):
        telemetry.note_error(request, error.code)
        response = error_response(error)
    else:
        telemetry.note_error(request, "server_error")
        logger.error("a stream failed", exc_info=error, extra=FAULT)
        response = error_response(server_error())
    return "error", json.loads(bytes(response.body))


def _describe(generator: Generator, limits: Limits, model: ModelConfig) -> Model:
    family, defaults = model.traits, model.defaults
    without: set[str] = {param for param in PARAMETERS if param not in family.parameters}
    if not generator.expands_prompts:
        without |= {"enable_prompt_expansion"}
    if not generator.checks_images:
        without |= {"moderation"}
    return Model(
        id=model.name,
        created=STARTED,
        owned_by="glm-image-server",
        description=model.description,
        family=model.family,
        editing=family.max_sources > 0,
        max_source_images=family.max_sources,
        sizes=Sizes(min=family.min_side, max=family.max_side, multiple_of=family.side_multiple),
        defaults=Defaults(
            size=f"{defaults.width}x{defaults.height}",
            num_inference_steps=defaults.steps,
            guidance_scale=model.guidance_scale(editing=False),
            edit_guidance_scale=model.guidance_scale(editing=True),
            strength=defaults.strength if "strength" in family.parameters else None,
        ),
        limits=Bounds(
            n=limits.max_images,
            num_inference_steps=limits.max_steps,
            guidance_scale=limits.max_guidance_scale,
            prompt_chars=limits.max_prompt_chars,
            pixels=limits.max_pixels,
            megapixel_steps=limits.max_megapixel_steps,
        ),
        guidance_off=family.guidance_off,
        parameters=[
            name
            for name, field in GenerationRequest.model_fields.items()
            if field.description != HINT and name not in without
        ],
        safety_checker=generator.checks_images,
        prompt_expansion=generator.expands_prompts,
        lossy_options=model.decoder.lossy,
    )
