"""Z.ai's API: https://docs.z.ai/api-reference/image/generate-image, at once or as a task to come back for.

`seed`, `num_inference_steps` and `guidance_scale` are this server's own, sent by the official client through
`extra_body`.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, field_validator

from serve_app.dialects.bodies import (
    NOT_BLANK,
    Fields,
    JSONFields,
    document_body,
    document_errors,
    parsed_size,
    read_json,
    request_id,
)
from serve_app.errors import InvalidParameter, RequestError, in_words
from serve_app.generation.delivery import error_of
from serve_app.generation.images import Encoding
from serve_app.generation.orders import Order
from serve_app.generation.request import MAX_ID_CHARS, MAX_SEED, Generation
from serve_app.generation.safety import VIOLATION
from serve_app.jobs.runner import Submission
from serve_app.jobs.store import Job, Owner, State
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve_app.config import Limits
    from serve_app.generation.delivery import Delivered, Delivery
    from serve_app.generation.generator import Generator
    from serve_app.http.links import Links
    from serve_app.jobs.runner import JobRunner
    from serve_app.jobs.store import JobStore

API = "zai"
"""What jobs of these routes are marked by."""
PATHS = ("/api/paas/v4/",)
"""What all of this API's begin with."""
SIZE = "1280x1280"
STEPS = {"hd": 50, "standard": 30}
PARAMETERS = {"steps": "num_inference_steps"}
"""What this API calls the parameters of a `Generation`, where that is not their name."""
CODES = {
    "missing_api_key": "1001",
    "invalid_api_key": "1002",
    "expired_token": "1003",
    "model_not_found": "1211",
    "missing_required_parameter": "1213",
    VIOLATION: "1301",
    "job_not_found": "1214",
}
CODES_BY_STATUS = {400: "1214", 404: "1222", 405: "1222", 413: "1214", 429: "1302"}
"""https://docs.z.ai/api-reference/api-code; what is in neither has its status."""
TASK_STATUS: dict[State, Literal["PROCESSING", "SUCCESS", "FAIL"]] = {
    "queued": "PROCESSING",
    "running": "PROCESSING",
    "succeeded": "SUCCESS",
    "failed": "FAIL",
    "cancelled": "FAIL",
}
HINT = "A hint without an effect here."


class SensitiveWordCheck(Fields):
    """Taken, but no checker is configured: nothing is checked."""

    type: Literal["ALL"] | None = None
    status: Literal["ENABLE", "DISABLE"] | None = None


class ImageRequest(JSONFields):
    """What to make. Null means that a field is unset."""

    model: str
    prompt: str = Field(
        min_length=1,
        description="What to paint. Text to be rendered is in quotation marks.",
        json_schema_extra={"pattern": NOT_BLANK},
    )
    n: int | None = Field(default=None, ge=1, description="Image i has the seed `seed` + i; 1 if unset.")
    size: str | None = Field(
        default=None,
        pattern="^[0-9]{1,5}x[0-9]{1,5}$",
        description=f"`WIDTHxHEIGHT`, each a multiple of 32 from 512 to 2048; {SIZE} if unset.",
    )
    quality: Literal["hd", "standard"] | None = Field(
        default=None, description="Denoising steps: `hd` 50, `standard` 30; the model's default if unset."
    )
    response_format: Literal["url", "b64_json"] | None = Field(default=None, description="`url` if unset.")
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="Classifier-free guidance; off at 1 and below."
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Drawn if unset.")
    style: Literal["vivid", "natural"] | None = Field(default=None, description=HINT)
    user: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    user_id: str | None = Field(default=None, min_length=6, max_length=128, description=HINT)
    request_id: str | None = Field(
        default=None, min_length=1, max_length=MAX_ID_CHARS, description="Is in the answer again."
    )
    sensitive_word_check: SensitiveWordCheck | None = None
    watermark_enabled: bool | None = Field(default=None, description="Refused if true: no watermark is made.")

    @field_validator("watermark_enabled")
    @classmethod
    def _no_watermark(cls, wanted: bool | None) -> bool | None:
        if wanted:
            raise RequestError(
                "This server makes no watermarks; leave watermark_enabled out, or set it to false.",
                param="watermark_enabled",
                code="unsupported_parameter",
            )
        return wanted


class Error(BaseModel):
    """What is wrong, and what to do."""

    code: str
    message: str


class Image(BaseModel):
    """An image: where it is, or what it is."""

    url: str | None = None
    b64_json: str | None = None


class ContentFilter(BaseModel):
    """What was found by checking the images."""

    role: Literal["assistant"] = "assistant"
    level: int = Field(
        ge=0,
        le=3,
        description="From 0, which is withheld, to 3, the lightest, which what was not checked has, too.",
    )


class Images(BaseModel):
    """What was made."""

    created: int = Field(description="Seconds since 1970.")
    id: str
    request_id: str
    data: list[Image]
    content_filter: list[ContentFilter]


class Task(BaseModel):
    """What is made meanwhile."""

    id: str
    model: str
    request_id: str
    task_status: Literal["PROCESSING", "SUCCESS", "FAIL"]
    image_result: list[Image] | None = Field(default=None, description="When it has succeeded.")
    content_filter: list[ContentFilter] | None = Field(
        default=None, description="When it has succeeded, or failed over what was found."
    )
    error: Error | None = Field(default=None, description="When it has failed.")


class ZaiError(BaseModel):
    """The answer to a request that fails."""

    error: Error
    content_filter: list[ContentFilter] | None = Field(
        default=None, description="If it fails over what was found."
    )


def error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in this API's envelope."""
    error = in_words(error, PARAMETERS)
    status = 400 if error.code == "model_not_found" else error.status
    body = ZaiError(error=_error(error), content_filter=_withheld(error))
    return JSONResponse(body.model_dump(exclude_none=True), status, error.headers)


def _error(error: RequestError | InvalidParameter) -> Error:
    error = in_words(error, PARAMETERS)
    code = CODES.get(error.code) or CODES_BY_STATUS.get(error.status, str(error.status))
    return Error(code=code, message=error.message)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in this API's envelope for each status."""
    return document_errors(ZaiError, 401, *statuses)


def _withheld(error: RequestError | InvalidParameter) -> list[ContentFilter] | None:
    return [ContentFilter(level=0)] if error.code == VIOLATION else None


def _found(made: Sequence[Delivered]) -> list[ContentFilter]:
    """What was found of images that are not withheld: their levels are thirds of what is."""
    risk = max(one.facts["risk"] or 0 for one in made)
    return [ContentFilter(level=3 - int(3 * risk))]


def _images(made: Sequence[Delivered]) -> list[Image]:
    return [Image(url=one.url, b64_json=one.base64) for one in made]


def router(
    generator: Generator,
    delivery: Delivery,
    runner: JobRunner,
    store: JobStore,
    links: Links,
    limits: Limits,
) -> APIRouter:
    """The routes of this API."""
    routes = APIRouter(prefix="/api/paas/v4")

    async def read(request: Request) -> tuple[ImageRequest, Order]:
        fields = await read_json(request, ImageRequest, limits.max_json_bytes)
        steps = fields.num_inference_steps
        if steps is None and fields.quality:
            steps = STEPS[fields.quality]
        generation = Generation(
            model=generator.model(fields.model).name,
            prompt=fields.prompt,
            size=parsed_size(fields.size or SIZE),
            n=fields.n or 1,
            steps=steps,
            guidance_scale=fields.guidance_scale,
            seed=fields.seed,
            api="zai",
            request_id=request_id(request),
            key_id=request.state.key_id,
        )
        return fields, Order(generation=generation, encoding=Encoding("png"))

    @routes.post(
        "/images/generations",
        name="zai_generations",
        response_model_exclude_none=True,
        responses=errors(400, 408, 413, 429, 500, 503, 504, 507),
        openapi_extra=document_body(ImageRequest),
    )
    async def generations(request: Request) -> Images:
        """Make images while the client waits."""
        fields, order = await read(request)
        made = await delivery.make(request, order, inline=fields.response_format == "b64_json")
        task_id = str(uuid.uuid4())
        return Images(
            created=int(time.time()),
            id=task_id,
            request_id=fields.request_id or task_id,
            data=_images(made),
            content_filter=_found(made),
        )

    @routes.post(
        "/async/images/generations",
        name="zai_async_generations",
        response_model_exclude_none=True,
        responses=errors(400, 408, 413, 429, 500, 503, 507),
        openapi_extra=document_body(ImageRequest),
    )
    async def async_generations(request: Request) -> Task:
        """Begin a task that makes images."""
        fields, order = await read(request)
        base = links.base(request)
        answer = {name: getattr(fields, name) for name in ("model", "request_id", "response_format")}
        job, _ = await runner.submit(Submission(order=order, api=API, answer=answer, base_url=base))
        telemetry.note_job(request, job)
        return await task(job, base)

    @routes.get(
        "/async-result/{task_id}",
        name="zai_async_result",
        response_model_exclude_none=True,
        responses=errors(404, 410, 503),
    )
    async def async_result(task_id: str, request: Request) -> Task:
        """How a task gets on, and its images when it has succeeded."""
        job = await store.get(Owner(request.state.key_id, API), task_id)
        return await task(job, links.base(request))

    async def task(job: Job, base: str) -> Task:
        inline = job.answer["response_format"] == "b64_json"
        made = await delivery.of(job, base, inline=inline) if job.state == "succeeded" else []
        error = error_of(job.error) if job.error else None
        return Task(
            id=job.id,
            model=job.answer["model"],
            request_id=job.answer["request_id"] or job.id,
            task_status=TASK_STATUS[job.state],
            image_result=_images(made) if made else None,
            content_filter=_found(made) if made else error and _withheld(error),
            error=error and _error(error),
        )

    return routes
