"""Pixazo's API for GLM-Image: submit, ask how it gets on, fetch the result.

Its documentation contradicts itself about what each route answers, so that all of them answer with one body
that has everything. (https://www.pixazo.ai/models/text-to-image/glm-image-api)
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from serve_app.dialects.bodies import JSONFields, document_body, document_errors, parse_json, read
from serve_app.dialects.hosted import PARAMETERS, EditInput, ImageInput, InputReader
from serve_app.errors import InvalidParameter, RequestError, in_words
from serve_app.generation.delivery import error_of
from serve_app.generation.safety import VIOLATION
from serve_app.jobs.runner import Submission
from serve_app.jobs.store import Job, Owner, State
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable

    from serve_app.config import Limits
    from serve_app.generation.delivery import Delivery
    from serve_app.generation.generator import Generator
    from serve_app.generation.sources import SourceReader
    from serve_app.http.links import Links
    from serve_app.jobs.runner import JobRunner
    from serve_app.jobs.store import JobStore

API = "pixazo"
"""What jobs of these routes are marked by."""
MODEL = "glm-image"
IMAGE, EDIT = "glm-image", "glm-image-image-to-image"
"""What the two kinds of requests are called, in paths and ids."""
NESTED_PATHS = (f"/{IMAGE}/v1/", "/v2/requests/")
FLAT_PATHS = (f"/{EDIT}/v1/",)
"""What all of this API's begin with, by their envelope of errors."""
CODES = {
    400: "INVALID_PARAMETER",
    401: "UNAUTHORIZED",
    404: "NOT_FOUND",
    410: "NOT_FOUND",
    429: "RATE_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
}
MESSAGES = {
    "missing_api_key": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "invalid_api_key": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "expired_token": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "server_error": "Internal server error. Please retry later.",
    "job_not_found": "Operation not found",
}
"""The documentation's words."""
REQUESTS_FAULTS = ("out_of_memory", "model_loading_failed", "deadline_exceeded")
"""Of the failures with a status of 500 and above those that are the request's or the model's."""
STATUS: dict[State, Literal["QUEUED", "PROCESSING", "COMPLETED", "FAILED"]] = {
    "queued": "QUEUED",
    "running": "PROCESSING",
    "succeeded": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "FAILED",
}
WAIT = re.compile(r"(?:^|[,;\s])wait=([0-9]{1,6})(?:$|[,;\s])")
"""https://www.rfc-editor.org/rfc/rfc7240#section-4.3"""


class ResultBody(JSONFields):
    """Which request's result is wanted."""

    request_id: str


class StatusBody(JSONFields):
    """Which request's status is wanted, if the body says so too."""

    request_id: str | None = None


class PixazoImage(BaseModel):
    """An image."""

    file_name: str
    content_type: str
    url: str = Field(description="Where it is; a data URL with `sync_mode`.")
    width: int
    height: int


class Media(BaseModel):
    """The same images once more."""

    media_url: list[str]


class Error(BaseModel):
    """What is wrong, and what to do."""

    code: str
    message: str


class NestedError(BaseModel):
    """The answer to a request that fails."""

    error: Error


class FlatError(BaseModel):
    """The answer to a request for an edit that fails."""

    error: str
    code: str


class Result(BaseModel):
    """How a request gets on, and its images when it has completed."""

    request_id: str
    status: Literal["QUEUED", "PROCESSING", "COMPLETED", "FAILED", "ERROR"]
    polling_url: str
    output: Media | None = None
    error: Error | None = None
    images: list[PixazoImage] = []
    description: Literal[""] = ""
    created_at: str
    updated_at: str
    seed: int = Field(description="Of the first image.")


def _error(error: RequestError | InvalidParameter) -> Error:
    error = in_words(error, PARAMETERS)
    message = MESSAGES.get(error.code, error.message)
    if error.status == HTTPStatus.TOO_MANY_REQUESTS and "Retry-After" in error.headers:
        message = f"Rate limit exceeded. Retry after {error.headers['Retry-After']} seconds."
    code = CODES.get(error.status, HTTPStatus(error.status).name)
    if error.code == VIOLATION:
        code = VIOLATION.upper()
    return Error(code=code, message=message)


def nested_error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in this API's envelope."""
    worded = in_words(error, PARAMETERS)
    return JSONResponse({"error": vars(_error(worded))}, worded.status, worded.headers)


def flat_error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in the envelope of this API's edits."""
    worded = in_words(error, PARAMETERS)
    told = _error(worded)
    code, message = told.code, told.message
    if code == "INVALID_PARAMETER":
        code = "VALIDATION_ERROR"
    if worded.code == "missing_required_parameter":
        message = f"Missing required parameter: {worded.param}"
    return JSONResponse({"error": message, "code": code}, worded.status, worded.headers)


def nested_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in the nested envelope for each status."""
    return document_errors(NestedError, 401, *statuses)


def flat_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in the flat envelope for each status."""
    return document_errors(FlatError, 401, *statuses)


def router(
    generator: Generator,
    delivery: Delivery,
    runner: JobRunner,
    store: JobStore,
    sources: SourceReader,
    links: Links,
    limits: Limits,
) -> APIRouter:
    """The routes of this API."""
    routes = APIRouter()
    reader = InputReader(generator, sources, limits, API)

    async def view(job: Job, base: str) -> Result:
        made = []
        if job.state == "succeeded":
            made = await delivery.of(job, base, inline=job.answer["sync_mode"])
        error = error_of(job.error) if job.error else None
        request_id = f"{job.answer['kind']}_{job.id}"
        status = STATUS[job.state]
        ours = isinstance(error, RequestError) and error.status >= 500 and error.code not in REQUESTS_FAULTS
        return Result(
            request_id=request_id,
            status="ERROR" if ours else status,
            polling_url=f"{base}/v2/requests/status/{request_id}",
            output=Media(media_url=[one.data_url for one in made]) if made else None,
            error=_error(error) if error else None,
            images=[
                PixazoImage(
                    file_name=one.facts["name"],
                    content_type=one.media_type,
                    url=one.data_url,
                    width=one.facts["width"],
                    height=one.facts["height"],
                )
                for one in made
            ],
            created_at=_iso(job.created_at),
            updated_at=_iso(job.ended_at or job.started_at or job.created_at),
            seed=job.request["seed"],
        )

    async def find(request: Request, request_id: str, *kinds: str) -> Job:
        kind, _, job_id = request_id.rpartition("_")
        job = await store.get(Owner(request.state.key_id, API), job_id)
        if kind not in kinds or job.answer["kind"] != kind:
            raise RequestError("There is no such request.", code="job_not_found", status=404)
        return job

    def add_kind(
        kind: str, fields_type: type[ImageInput], errors: Callable[..., dict[int | str, dict[str, Any]]]
    ) -> None:
        """The routes that submit requests of one kind and fetch their results."""

        @routes.post(
            f"/{kind}/v1/{kind}-request",
            name=f"pixazo_submit_{kind}".replace("-", "_"),
            response_model=Result,
            responses=errors(400, 404, 408, 413, 429, 500, 503, 507),
            openapi_extra=reader.document(fields_type),
        )
        async def submit(
            request: Request,
            response: Response,
            prefer: Annotated[
                str, Header(max_length=256, description="`wait=N`: for the images, up to N seconds.")
            ] = "",
        ) -> Result:
            """Submit a request."""
            fields, order = await reader.read(request, fields_type, MODEL)
            base = links.base(request)
            job, _ = await runner.submit(
                Submission(
                    order=order,
                    api=API,
                    answer={"kind": kind, "sync_mode": fields.sync_mode or False},
                    base_url=base,
                )
            )
            telemetry.note_job(request, job)
            if wait := WAIT.search(prefer):
                response.headers["Preference-Applied"] = f"wait={wait[1]}"
                job = await _ended(store, job, min(float(wait[1]), limits.deadline_s))
            return await view(job, base)

        @routes.post(
            f"/{kind}/v1/{kind}-request-result",
            name=f"pixazo_result_{kind}".replace("-", "_"),
            response_model=Result,
            responses=errors(400, 404, 408, 410, 413, 503),
            openapi_extra=document_body(ResultBody),
        )
        async def result(request: Request) -> Result:
            """How a request gets on, and its images when it has completed."""
            # Whatever type of body is declared: the documentation's curl declares a form's.
            wanted = await parse_json(await read(request, limits.max_json_bytes), ResultBody)
            return await view(await find(request, wanted.request_id, kind), links.base(request))

        @routes.get(
            f"/{kind}/v1/{kind}-request-result",
            name=f"pixazo_get_result_{kind}".replace("-", "_"),
            response_model=Result,
            responses=errors(400, 404, 410, 503),
        )
        async def get_result(request: Request, request_id: Annotated[str, Query(max_length=128)]) -> Result:
            """The same, by the address alone."""
            return await view(await find(request, request_id, kind), links.base(request))

    add_kind(IMAGE, ImageInput, nested_errors)
    add_kind(EDIT, EditInput, flat_errors)

    @routes.get(
        "/v2/requests/status/{request_id}", name="pixazo_get_status", responses=nested_errors(404, 410, 503)
    )
    async def get_status(request: Request, request_id: str) -> Result:
        """How a request gets on, and its images when it has completed."""
        return await view(await find(request, request_id, IMAGE, EDIT), links.base(request))

    @routes.post(
        "/v2/requests/status/{request_id}",
        name="pixazo_status",
        responses=nested_errors(400, 404, 408, 410, 413, 503),
        openapi_extra=document_body(StatusBody, required=False),
    )
    async def status(request: Request, request_id: str) -> Result:
        """The same; what the body says must agree."""
        if body := await read(request, limits.max_json_bytes):
            named = (await parse_json(body, StatusBody)).request_id
            if named not in (None, request_id):
                raise RequestError("request_id is not that of the address.", param="request_id")
        return await get_status(request, request_id)

    return routes


async def _ended(store: JobStore, job: Job, within_s: float) -> Job:
    """The job when it has ended or, if it does not within so many seconds, as it is then."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            async for seen in store.watch(Owner(job.key_id, API), job.id):
                job = seen
    return job


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
