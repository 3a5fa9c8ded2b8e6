"""Z.ai's API: https://docs.z.ai/api-reference/image/generate-image, synchronous or as a task.

`seed`, `num_inference_steps` and `guidance_scale` are this server's own; the official client sends them
through `extra_body`.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, field_validator

from serve_app.dialects.base import Dialect
from serve_app.dialects.bodies import (
    HINT,
    NOT_BLANK,
    PROMPT,
    JSONFields,
    document_body,
    document_errors,
    parsed_size,
    read_json,
    request_id,
)
from serve_app.errors import Invalid, RequestError
from serve_app.generation.request import MAX_ID_CHARS, MAX_SEED, GenerationRequest
from serve_app.generation.safety import VIOLATION
from serve_app.http.errors import headers_of, status_of
from serve_app.jobs.submission import Submission
from serve_app.jobs.tables import Job, Owner, State
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from serve_app.generation.delivery import Delivered
    from serve_app.http.services import Services

API = "zai"
"""The name of this dialect, and the `api` of its jobs."""
SIZE = "1280x1280"
STEPS = {"hd": 50, "standard": 30}
NAMES = {"steps": "num_inference_steps"}
"""This API's names of parameters that have other names here."""
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
"""https://docs.z.ai/api-reference/api-code. An error that is in neither table has its status as code."""
TASK_STATUS: dict[State, Literal["PROCESSING", "SUCCESS", "FAIL"]] = {
    "queued": "PROCESSING",
    "running": "PROCESSING",
    "succeeded": "SUCCESS",
    "failed": "FAIL",
    "cancelled": "FAIL",
}


class SensitiveWordCheck(JSONFields):
    """Accepted for compatibility; has no effect."""

    type: Literal["ALL"] | None = None
    status: Literal["ENABLE", "DISABLE"] | None = None


class ImageInput(JSONFields):
    """Fields of a request. Null means that a field is unset."""

    model: str
    prompt: str = Field(
        min_length=1,
        description=PROMPT,
        json_schema_extra={"pattern": NOT_BLANK},
    )
    n: int | None = Field(
        default=None, ge=1, description="Number of images; image i has the seed `seed` + i. Defaults to 1."
    )
    size: str | None = Field(
        default=None,
        pattern="^[0-9]{1,5}x[0-9]{1,5}$",
        description=f"`WIDTHxHEIGHT`, each a multiple of 32 from 512 to 2048. Defaults to {SIZE}.",
    )
    quality: Literal["hd", "standard"] | None = Field(
        default=None, description="Denoising steps: `hd` 50, `standard` 30. Defaults to the model's steps."
    )
    response_format: Literal["url", "b64_json"] | None = Field(default=None, description="Defaults to `url`.")
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, allow_inf_nan=False, description="Classifier-free guidance; off at 1 and below."
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Drawn if unset.")
    style: Literal["vivid", "natural"] | None = Field(default=None, description=HINT)
    user: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    user_id: str | None = Field(default=None, min_length=6, max_length=128, description=HINT)
    request_id: str | None = Field(
        default=None, min_length=1, max_length=MAX_ID_CHARS, description="Returned in the answer."
    )
    sensitive_word_check: SensitiveWordCheck | None = None
    watermark_enabled: bool | None = Field(
        default=None, description="True is rejected: this server makes no watermarks."
    )

    @field_validator("watermark_enabled")
    @classmethod
    def _no_watermark(cls, wanted: bool | None) -> bool | None:
        if wanted:
            raise Invalid(
                "This server makes no watermarks; remove watermark_enabled, or set it to false.",
                param="watermark_enabled",
                code="unsupported_parameter",
            )
        return wanted


class Error(BaseModel):
    """The problem, and the remedy."""

    code: str
    message: str


class Image(BaseModel):
    """An image: its URL, or its file in base64."""

    url: str | None = None
    b64_json: str | None = None


class ContentFilter(BaseModel):
    """Finding of the safety check."""

    role: Literal["assistant"] = "assistant"
    level: int = Field(
        ge=0,
        le=3,
        description="0: the image is withheld. 3: the image is harmless, or was not checked.",
    )


class Images(BaseModel):
    """Images of a request."""

    created: int = Field(description="Seconds since 1970.")
    id: str
    request_id: str
    data: list[Image]
    content_filter: list[ContentFilter]


class Task(BaseModel):
    """An enqueued request."""

    id: str
    model: str
    request_id: str
    task_status: Literal["PROCESSING", "SUCCESS", "FAIL"]
    image_result: list[Image] | None = Field(default=None, description="Set when it has succeeded.")
    content_filter: list[ContentFilter] | None = Field(
        default=None, description="Set when it has succeeded, or failed over a finding."
    )
    error: Error | None = Field(default=None, description="Set when it has failed.")


class ZaiError(BaseModel):
    """The answer to a request that fails."""

    error: Error
    content_filter: list[ContentFilter] | None = Field(
        default=None, description="Set if it fails over a finding."
    )


def error_response(error: RequestError, _: Scope) -> JSONResponse:
    """Returns the answer to a request that fails."""
    error = error.for_api(NAMES)
    status = 400 if error.code == "model_not_found" else status_of(error)
    body = ZaiError(error=_error(error), content_filter=_withheld(error))
    return JSONResponse(body.model_dump(exclude_none=True), status, headers_of(error))


def _error(error: RequestError) -> Error:
    error = error.for_api(NAMES)
    status = status_of(error)
    code = CODES.get(error.code) or CODES_BY_STATUS.get(status, str(status))
    return Error(code=code, message=error.message)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in this API's envelope for each status, for the OpenAPI document."""
    return document_errors(ZaiError, 401, *statuses)


def _withheld(error: RequestError) -> list[ContentFilter] | None:
    return [ContentFilter(level=0)] if error.code == VIOLATION else None


def _found(made: Sequence[Delivered]) -> list[ContentFilter]:
    """Returns the findings over images that are not withheld: thirds of the threshold."""
    risk = max(one.record.risk or 0 for one in made)
    return [ContentFilter(level=3 - int(3 * risk))]


def _images(made: Sequence[Delivered]) -> list[Image]:
    return [Image(url=one.url, b64_json=one.base64) for one in made]


def router(services: Services) -> APIRouter:
    """Returns the routes of this API."""
    routes = APIRouter(prefix="/api/paas/v4", tags=["Z.ai"])

    @routes.post(
        "/images/generations",
        name="zai_generations",
        response_model_exclude_none=True,
        responses=errors(400, 408, 413, 429, 500, 503, 504, 507),
        openapi_extra=document_body(ImageInput),
    )
    async def generations(request: Request) -> Images:
        """Makes images while the client waits."""
        fields, asked = await _read(services, request)
        base = None if fields.response_format == "b64_json" else services.base(request)
        made = await services.delivery.make(asked, base)
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
        openapi_extra=document_body(ImageInput),
    )
    async def async_generations(request: Request) -> Task:
        """Enqueues a task that makes images."""
        fields, asked = await _read(services, request)
        base = services.base(request)
        answer = {name: getattr(fields, name) for name in ("model", "request_id", "response_format")}
        submission = Submission(request=asked, api=API, base_url=base, answer=answer)
        job, _ = await services.submitter.submit(submission)
        telemetry.note_job(job)
        return await _task(services, job, base)

    @routes.get(
        "/async-result/{task_id}",
        name="zai_async_result",
        response_model_exclude_none=True,
        responses=errors(404, 410, 503),
    )
    async def async_result(task_id: str, request: Request) -> Task:
        """Returns a task, with its images when it has succeeded."""
        job = await services.jobs.get(Owner(request.state.key_id, API), task_id)
        return await _task(services, job, services.base(request))

    return routes


async def _read(services: Services, request: Request) -> tuple[ImageInput, GenerationRequest]:
    fields = await read_json(request, ImageInput, services.config.limits.max_json_bytes)
    steps = fields.num_inference_steps
    if steps is None and fields.quality:
        steps = STEPS[fields.quality]
    return fields, GenerationRequest(
        model=services.generator.model(fields.model).name,
        prompt=fields.prompt,
        size=parsed_size(fields.size or SIZE),
        n=fields.n or 1,
        steps=steps,
        guidance_scale=fields.guidance_scale,
        seed=fields.seed,
        api=API,
        request_id=request_id(request),
        key_id=request.state.key_id,
    )


async def _task(services: Services, job: Job, base: str) -> Task:
    where = None if job.answer["response_format"] == "b64_json" else base
    made = []
    if job.state == "succeeded":
        made = await services.delivery.kept(job.images, job.encoding.format, where)
    error = job.error.as_error() if job.error else None
    return Task(
        id=job.id,
        model=job.answer["model"],
        request_id=job.answer["request_id"] or job.id,
        task_status=TASK_STATUS[job.state],
        image_result=_images(made) if made else None,
        content_filter=_found(made) if made else error and _withheld(error),
        error=error and _error(error),
    )


ZAI = Dialect(
    name=API,
    prefixes=("/api/paas/v4/",),
    routers=(router,),
    error_response=error_response,
    tags={"Z.ai": "Z.ai's API: https://docs.z.ai/api-reference/image/generate-image."},
)
