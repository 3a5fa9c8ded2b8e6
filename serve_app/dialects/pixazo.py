"""Pixazo's API for GLM-Image: submit a request, poll it, fetch the result.

Its documentation contradicts itself about the answers of the routes. So all of them have one body that
contains everything. (https://www.pixazo.ai/models/text-to-image/glm-image-api)
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

from serve_app.dialects.base import Dialect, path_of
from serve_app.dialects.bodies import JSONFields, document_body, document_errors, parse_json, read
from serve_app.dialects.fal_and_pixazo import NAMES, EditInput, ImageInput, InputReader
from serve_app.errors import Busy, Invalid, NotFound, RequestError
from serve_app.generation.safety import VIOLATION
from serve_app.http.errors import headers_of, status_of
from serve_app.jobs.submission import Submission
from serve_app.jobs.tables import Job, Owner, State
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

    from serve_app.http.services import Services
    from serve_app.jobs.store import JobStore

API = "pixazo"
"""The name of this dialect, and the `api` of its jobs."""
MODEL = "glm-image"
IMAGE, EDIT = "glm-image", "glm-image-image-to-image"
"""Names of the two kinds of requests, in paths and ids."""
NESTED_PATHS = (f"/{IMAGE}/v1/", "/v2/requests/")
FLAT_PATHS = (f"/{EDIT}/v1/",)
"""Prefixes of this API's paths, by their envelope of errors."""
CODES = {VIOLATION: "CONTENT_POLICY_VIOLATION"}
"""Pixazo's codes by ours."""
CODES_BY_STATUS = {
    400: "INVALID_PARAMETER",
    401: "UNAUTHORIZED",
    404: "NOT_FOUND",
    410: "NOT_FOUND",
    429: "RATE_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
}
"""Pixazo's codes of other errors. An error that is in neither table has the name of its status as code."""
EDIT_CODES = {"INVALID_PARAMETER": "VALIDATION_ERROR"}
"""Codes that the routes of edits have instead."""
MESSAGES = {
    "missing_api_key": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "invalid_api_key": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "expired_token": "Missing or invalid Ocp-Apim-Subscription-Key header",
    "server_error": "Internal server error. Please retry later.",
    "job_not_found": "Operation not found",
}
"""The documentation's words."""
REQUESTS_FAULTS = ("out_of_memory", "model_loading_failed", "deadline_exceeded")
"""Codes of faults that are the request's or the model's."""
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
    """Selection of a request."""

    request_id: str


class StatusBody(JSONFields):
    """Selection of a request, which the path has already."""

    request_id: str | None = None


class PixazoImage(BaseModel):
    """An image."""

    file_name: str
    content_type: str
    url: str = Field(description="URL of the file; a data URL with `sync_mode`.")
    width: int
    height: int


class Media(BaseModel):
    """URLs of the images."""

    media_url: list[str]


class Error(BaseModel):
    """The problem, and the remedy."""

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
    """A request, with its images when it has completed."""

    request_id: str
    status: Literal["QUEUED", "PROCESSING", "COMPLETED", "FAILED", "ERROR"]
    polling_url: str
    output: Media | None = None
    error: Error | None = None
    images: list[PixazoImage] = []
    description: Literal[""] = ""
    created_at: str
    updated_at: str
    seed: int = Field(description="Seed of the first image.")


def _error(error: RequestError) -> Error:
    error = error.for_api(NAMES)
    status = status_of(error)
    message = MESSAGES.get(error.code, error.message)
    if isinstance(error, Busy) and error.retry_after_s is not None:
        message = f"Rate limit exceeded. Retry after {error.retry_after_s} seconds."
    code = CODES.get(error.code) or CODES_BY_STATUS.get(status) or HTTPStatus(status).name
    return Error(code=code, message=message)


def error_response(error: RequestError, scope: Scope) -> JSONResponse:
    """Returns the answer to a request that fails. Routes of edits have an envelope of their own."""
    error = error.for_api(NAMES)
    shown = _error(error)
    body: dict[str, Any]
    if path_of(scope).startswith(FLAT_PATHS):
        message = shown.message
        if error.code == "missing_required_parameter":
            message = f"Missing required parameter: {error.param}"
        body = {"error": message, "code": EDIT_CODES.get(shown.code, shown.code)}
    else:
        body = {"error": vars(shown)}
    return JSONResponse(body, status_of(error), headers_of(error))


def nested_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in the nested envelope for each status, for the OpenAPI document."""
    return document_errors(NestedError, 401, *statuses)


def flat_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in the flat envelope for each status, for the OpenAPI document."""
    return document_errors(FlatError, 401, *statuses)


def router(services: Services) -> APIRouter:
    """Returns the routes of this API."""
    routes = APIRouter(tags=["Pixazo"])
    _add_submission(routes, services, IMAGE, ImageInput, nested_errors)
    _add_results(routes, services, IMAGE, nested_errors)
    _add_submission(routes, services, EDIT, EditInput, flat_errors)
    _add_results(routes, services, EDIT, flat_errors)
    _add_status(routes, services)
    return routes


async def _view(services: Services, job: Job, base: str) -> Result:
    made = []
    if job.state == "succeeded":
        where = None if job.answer["sync_mode"] else base
        made = await services.delivery.kept(job.images, job.encoding.format, where)
    error = job.error.as_error() if job.error else None
    request_id = f"{job.answer['kind']}_{job.id}"
    server_is_at_fault = (
        job.error is not None and job.error.is_fault and job.error.code not in REQUESTS_FAULTS
    )
    return Result(
        request_id=request_id,
        status="ERROR" if server_is_at_fault else STATUS[job.state],
        polling_url=f"{base}/v2/requests/status/{request_id}",
        output=Media(media_url=[one.data_url for one in made]) if made else None,
        error=_error(error) if error else None,
        images=[
            PixazoImage(
                file_name=one.record.name,
                content_type=one.media_type,
                url=one.data_url,
                width=one.record.width,
                height=one.record.height,
            )
            for one in made
        ],
        created_at=_iso(job.created_at),
        updated_at=_iso(job.ended_at or job.started_at or job.created_at),
        seed=job.request.seed,
    )


async def _find(services: Services, request: Request, request_id: str, *kinds: str) -> Job:
    kind, _, job_id = request_id.rpartition("_")
    job = await services.jobs.get(Owner(request.state.key_id, API), job_id)
    if kind not in kinds or job.answer["kind"] != kind:
        raise NotFound("There is no such request.", code="job_not_found")
    return job


def _add_submission(
    routes: APIRouter,
    services: Services,
    kind: str,
    fields_type: type[ImageInput],
    errors: Callable[..., dict[int | str, dict[str, Any]]],
) -> None:
    """Adds the route that submits requests of one kind."""
    limits = services.config.limits
    reader = InputReader(services.generator, limits, API)

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
            str, Header(max_length=256, description="`wait=N` waits up to N seconds for the images.")
        ] = "",
    ) -> Result:
        """Submits a request."""
        fields, asked = await reader.read(request, fields_type, MODEL)
        base = services.base(request)
        answer = {"kind": kind, "sync_mode": fields.sync_mode or False}
        submission = Submission(request=asked, api=API, base_url=base, answer=answer)
        job, _ = await services.submitter.submit(submission)
        telemetry.note_job(job)
        if wait := WAIT.search(prefer):
            response.headers["Preference-Applied"] = f"wait={wait[1]}"
            job = await _ended(services.jobs, job, min(float(wait[1]), limits.deadline_s))
        return await _view(services, job, base)


def _add_results(
    routes: APIRouter,
    services: Services,
    kind: str,
    errors: Callable[..., dict[int | str, dict[str, Any]]],
) -> None:
    """Adds the routes that return the results of one kind of requests."""
    limits = services.config.limits

    @routes.post(
        f"/{kind}/v1/{kind}-request-result",
        name=f"pixazo_result_{kind}".replace("-", "_"),
        response_model=Result,
        responses=errors(400, 404, 408, 410, 413, 503),
        openapi_extra=document_body(ResultBody),
    )
    async def result(request: Request) -> Result:
        """Returns a request, with its images when it has completed."""
        # The declared media type is ignored: the documentation's curl declares a form.
        wanted = await parse_json(await read(request, limits.max_json_bytes), ResultBody)
        job = await _find(services, request, wanted.request_id, kind)
        return await _view(services, job, services.base(request))

    @routes.get(
        f"/{kind}/v1/{kind}-request-result",
        name=f"pixazo_get_result_{kind}".replace("-", "_"),
        response_model=Result,
        responses=errors(400, 404, 410, 503),
    )
    async def get_result(request: Request, request_id: Annotated[str, Query(max_length=128)]) -> Result:
        """Returns a request by its id in the query, with its images when it has completed."""
        job = await _find(services, request, request_id, kind)
        return await _view(services, job, services.base(request))


def _add_status(routes: APIRouter, services: Services) -> None:
    @routes.get(
        "/v2/requests/status/{request_id}", name="pixazo_get_status", responses=nested_errors(404, 410, 503)
    )
    async def get_status(request: Request, request_id: str) -> Result:
        """Returns a request, with its images when it has completed."""
        job = await _find(services, request, request_id, IMAGE, EDIT)
        return await _view(services, job, services.base(request))

    @routes.post(
        "/v2/requests/status/{request_id}",
        name="pixazo_status",
        responses=nested_errors(400, 404, 408, 410, 413, 503),
        openapi_extra=document_body(StatusBody, required=False),
    )
    async def status(request: Request, request_id: str) -> Result:
        """Returns a request. An id in the body must be the one of the path."""
        if body := await read(request, services.config.limits.max_json_bytes):
            named = (await parse_json(body, StatusBody)).request_id
            if named not in (None, request_id):
                raise Invalid(
                    f"request_id is {named!r:.100}, and the path has another one; send the same, or none.",
                    param="request_id",
                )
        return await get_status(request, request_id)


async def _ended(store: JobStore, job: Job, within_s: float) -> Job:
    """Returns the job when it has ended, or as it is after `within_s` seconds.

    The job was accepted. If the database cannot be reached meanwhile, the client gets it as it was last seen.
    """
    with suppress(TimeoutError, RequestError):
        async with asyncio.timeout(within_s):
            async for seen in store.watch(job.owner, job.id):
                job = seen
    return job


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


PIXAZO = Dialect(
    name=API,
    prefixes=NESTED_PATHS + FLAT_PATHS,
    routers=(router,),
    error_response=error_response,
    tags={"Pixazo": "Pixazo's API: https://www.pixazo.ai/models/text-to-image/glm-image-api."},
)
