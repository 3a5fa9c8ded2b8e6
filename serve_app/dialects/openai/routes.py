"""The OpenAI image API: https://platform.openai.com/docs/api-reference/images.

`num_inference_steps`, `guidance_scale` and `seed` are this server's own; the official clients send them
through `extra_body`. A field that cannot be honoured is rejected by name.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from deployments.families import PARAMETERS
from deployments.observability.log import FAULT
from serve_app.dialects.bodies import HINT, media_type
from serve_app.dialects.openai.errors import error_response
from serve_app.dialects.openai.openapi import ANSWERS, edit_body, generation_body
from serve_app.dialects.openai.parse import parse_form, parse_json
from serve_app.dialects.openai.schemas import (
    Bounds,
    Defaults,
    EditByReference,
    EditForm,
    GenerationInput,
    ImagesResponse,
    Model,
    Models,
    Sizes,
    errors,
    images_response,
    usage,
)
from serve_app.errors import Invalid, RequestError, server_error
from serve_app.generation import codec
from serve_app.generation.delivery import in_base64
from serve_app.generation.events import GeneratedImage, PartialImage, StageProgress, in_order
from serve_app.http.errors import status_of
from serve_app.http.sse import EventStream, SSEEvent
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.dialects.openai.parse import Parsed
    from serve_app.generation.generator import Generator
    from serve_app.http.services import Services

logger = logging.getLogger("ray.serve")

STARTED = int(time.time())


def router(services: Services) -> APIRouter:
    """Returns the routes of this API."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    generator, limits = services.generator, services.config.limits

    @routes.post(
        "/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=generation_body(generator, limits),
    )
    async def generations(request: Request) -> ImagesResponse | EventStream:
        """Makes images from text."""
        parsed = await parse_json(request, GenerationInput, limits, limits.max_json_bytes)
        return await _answer(services, request, parsed, "image_generation")

    @routes.post(
        "/images/edits",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=ANSWERS,
        openapi_extra=edit_body(generator, limits),
    )
    async def edits(request: Request) -> ImagesResponse | EventStream:
        """Makes images from text and one to four images: a form with files, or JSON with URLs."""
        parsed: Parsed[EditByReference] | Parsed[EditForm]
        if media_type(request) == "application/json":
            parsed = await parse_json(request, EditByReference, limits, limits.max_body_bytes)
        else:
            parsed = await parse_form(request, EditForm, limits)
        return await _answer(services, request, parsed, "image_edit")

    @routes.get("/models")
    async def list_models() -> Models:
        """Lists the models of this server. The first one is the default."""
        return Models(data=[_describe(generator, limits, model) for model in generator.models()])

    @routes.get("/models/{name}", responses=errors(404))
    async def get_model(name: str) -> Model:
        """Returns one model and its abilities."""
        return _describe(generator, limits, generator.model(name))

    return routes


async def _answer(
    services: Services, request: Request, parsed: Parsed[Any], kind: str
) -> ImagesResponse | EventStream:
    """Makes the images of a request; answers with them, or with a stream of events of this kind."""
    fields = parsed.fields
    if fields.partial_images and not fields.stream:
        raise Invalid(
            "Previews come in a stream only; set stream to true, or remove partial_images.",
            param="partial_images",
        )
    if fields.stream:
        return await EventStream.begin(partial(_events, services.generator, request, parsed, kind))
    base = None if fields.response_format == "b64_json" else services.base(request)
    made = await services.delivery.make(parsed.request, base)
    return images_response(made, parsed.quality, parsed.request.encoding.format, time.time())


async def _events(
    generator: Generator,
    request: Request,
    parsed: Parsed[Any],
    kind: str,
    all_sent: Callable[[], Awaitable[None]],
) -> AsyncGenerator[SSEEvent | None, None]:
    """Yields the events of a stream; see `EventStream.begin`."""
    is_accepted = is_made = False
    made: list[GeneratedImage] = []
    try:
        async with generator.admit(parsed.request) as running:
            is_accepted = True
            yield None
            async with aclosing(generator.run(running)) as events:
                async for event in events:
                    if isinstance(event, GeneratedImage):
                        made.append(event)
                    if not isinstance(event, StageProgress):
                        is_made = len(made) == parsed.request.n
                        yield await _rendered(event, parsed, kind, is_last=is_made)
            telemetry.note_images(in_order(made))
            await all_sent()  # until then the request keeps its place, and a drain waits for it
    except Exception as error:
        # A deadline after the last image ends only the wait: a slow client gets the images all the same.
        if not is_accepted or (is_made and not isinstance(error, RequestError)):
            raise
        if not is_made:
            yield _error_event(request, error)


async def _rendered(
    event: PartialImage | GeneratedImage, parsed: Parsed[Any], kind: str, *, is_last: bool
) -> SSEEvent:
    encoding = parsed.request.encoding
    height, width, _ = event.pixels.shape
    file = await asyncio.to_thread(codec.encode, event.pixels, encoding)
    data: dict[str, Any] = {
        "b64_json": await in_base64(file),
        "created_at": int(time.time()),
        "size": f"{width}x{height}",
        "quality": parsed.quality or "auto",
        "background": "opaque",
        "output_format": encoding.format,
    }
    if isinstance(event, PartialImage):
        name = f"{kind}.partial_image"
        data |= {"type": name, "partial_image_index": event.index}
    else:
        name = f"{kind}.completed"
        data |= {"type": name, "seed": event.facts.seed, "usage": usage([event.facts]).model_dump()}
    return SSEEvent(name=name, data=json.dumps(data), is_last=is_last)


def _error_event(request: Request, error: Exception) -> SSEEvent:
    if not isinstance(error, RequestError):
        logger.error("a stream failed", exc_info=error, extra=FAULT)
        error = server_error()
    telemetry.note_error(error.code, status_of(error))
    body = bytes(error_response(error, request.scope).body).decode()
    return SSEEvent(name="error", data=body, is_last=True)


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
        examples=list(model.examples or family.examples),
        vocabulary=list(model.vocabulary) or None,
        family=model.family,
        identity=model.identity,
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
            for name, field in GenerationInput.model_fields.items()
            if field.description != HINT and name not in without
        ],
        safety_checker=generator.checks_images,
        prompt_expansion=generator.expands_prompts,
        lossy_options=model.decoder.lossy,
        speculation=model.prior.speculation if family.draws_tokens else None,
    )
