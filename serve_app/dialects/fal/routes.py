"""fal's routes: run a request now, or queue it and fetch its result later."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from serve_app.dialects.bodies import document_body, document_errors, read_json
from serve_app.dialects.fal import views
from serve_app.dialects.fal.errors import errors
from serve_app.dialects.fal.hosts import REQUEST_ID
from serve_app.dialects.fal.schemas import (
    Cancelling,
    ImageToImage,
    Output,
    Status,
    Submitted,
    TextToImage,
    Upload,
    UploadRequest,
)
from serve_app.dialects.fal_and_pixazo import InputReader
from serve_app.errors import Conflict, NotFound, RequestError
from serve_app.http import sse
from serve_app.http.errors import CLIENT_CLOSED, status_of
from serve_app.jobs.submission import Submission
from serve_app.jobs.tables import Job, Owner, Priority
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from serve_app.dialects.fal_and_pixazo import ImageInput
    from serve_app.http.services import Services

API = "fal"
"""The name of this dialect, and the `api` of its jobs."""
QUEUED = "/queue/fal-ai/{app}/requests/{request_id}"

Seconds = Annotated[
    float | None,
    Header(
        alias="X-Fal-Request-Timeout",
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the request fails if its work has not begun.",
    ),
]


def router(services: Services) -> APIRouter:
    """Returns the routes of this API."""
    routes = APIRouter(tags=["fal"])
    _add_app(routes, services, "", TextToImage, "image")
    _add_app(routes, services, "/image-to-image", ImageToImage, "edit")
    _add_status(routes, services)
    _add_cancel(routes, services)
    _add_uploads(routes, services)
    return routes


def _add_app(
    routes: APIRouter, services: Services, path: str, fields_type: type[ImageInput], name: str
) -> None:
    """Adds the routes that run and queue requests with these fields."""
    reader = InputReader(services.generator, services.config.limits, API, blacken=True)

    @routes.post(
        f"/fal-ai/{{app}}{path}",
        name=f"fal_run_{name}",
        response_model=Output,
        responses=errors(404, 408, 413, 422, 429, 500, 503, 504, 507),
        openapi_extra=reader.document(fields_type),
    )
    async def run(app: str, request: Request, start_within_s: Seconds = None) -> Output:
        """Makes images while the client waits."""
        fields, asked = await reader.read(request, fields_type, app)
        base = None if fields.sync_mode else services.base(request)
        return views.output(await services.delivery.make(replace(asked, start_within_s=start_within_s), base))

    @routes.post(
        f"/queue/fal-ai/{{app}}{path}",
        name=f"fal_submit_{name}",
        response_model=Submitted,
        responses=errors(404, 408, 413, 422, 429, 500, 503, 507),
        openapi_extra=reader.document(fields_type),
    )
    async def submit(
        app: str,
        request: Request,
        response: Response,
        start_within_s: Seconds = None,
        fal_webhook: Annotated[str | None, Query(description="URL to POST the result to.")] = None,
        priority: Annotated[
            Priority, Header(alias="X-Fal-Queue-Priority", description="`low`: begin when no others wait.")
        ] = "normal",
    ) -> Submitted:
        """Enqueues a request."""
        fields, asked = await reader.read(request, fields_type, app)
        base = services.base(request)
        job, _ = await services.submitter.submit(
            Submission(
                request=replace(asked, start_within_s=start_within_s),
                api=API,
                base_url=base,
                answer={"app": app, "sync_mode": fields.sync_mode or False},
                priority=priority,
                webhook_url=fal_webhook,
            )
        )
        telemetry.note_job(job)
        response.headers[REQUEST_ID] = job.id
        return Submitted(status=views.STATUSES["queued"], gateway_request_id=job.id, **views.facts(job, base))


async def _find(services: Services, app: str, request_id: str, request: Request) -> Job:
    job = await services.jobs.get(Owner(request.state.key_id, API), request_id)
    if job.answer["app"] != app:
        raise NotFound(
            f"The app {app!r:.100} has no such request; use the URLs of the answer to its submission."
        )
    return job


def _add_status(routes: APIRouter, services: Services) -> None:
    async def find(app: str, request_id: str, request: Request) -> Job:
        return await _find(services, app, request_id, request)

    @routes.get(
        f"{QUEUED}/status",
        name="fal_status",
        response_model_exclude_none=True,
        responses=errors(404, 422, 503) | {202: {"model": Status, "description": "It has not ended."}},
    )
    async def status(
        request: Request,
        response: Response,
        job: Job = Depends(find),
        logs: Annotated[bool, Query(description="Whether to send the log.")] = False,
    ) -> Status:
        """Returns the status of a request."""
        response.status_code = 200 if job.has_ended else 202
        return views.status(job, services.base(request), job.log if logs else [])

    @routes.get(
        f"{QUEUED}/status/stream",
        name="fal_stream",
        response_class=Response,
        responses=sse.DOCUMENT | errors(404, 422, 503),
    )
    async def stream(
        request: Request,
        job: Job = Depends(find),
        logs: Annotated[bool, Query(description="Whether to send the log's new lines.")] = False,
    ) -> sse.EventStream:
        """Sends the status at every change, until the request has completed."""
        return await sse.EventStream.begin(lambda _: _statuses(services, request, job, logs=logs))

    @routes.get(
        QUEUED,
        name="fal_result",
        response_model=Output,
        responses=errors(400, 404, 410, 422, CLIENT_CLOSED, 500, 503, 504),
    )
    async def result(request: Request, job: Job = Depends(find)) -> JSONResponse:
        """Returns the answer that a synchronous request would have got."""
        return await views.result(services, job, services.base(request))


async def _statuses(
    services: Services, request: Request, job: Job, *, logs: bool
) -> AsyncGenerator[sse.SSEEvent | None, None]:
    """Yields the events of a queued request; see `EventStream.begin`."""
    yield None
    sent = 0
    try:
        async with aclosing(services.jobs.watch(job.owner, job.id)) as changes:
            async for seen in changes:
                news = seen.log[sent:] if logs else []
                sent = len(seen.log)
                shown = views.status(seen, services.base(request), news)
                yield sse.SSEEvent(data=shown.model_dump_json(exclude_none=True), is_last=seen.has_ended)
    except RequestError as error:  # the status has been sent, and this API has no error events
        telemetry.note_error(error.code, status_of(error))


def _add_cancel(routes: APIRouter, services: Services) -> None:
    @routes.put(
        f"{QUEUED}/cancel",
        name="fal_cancel",
        status_code=202,
        response_model=Cancelling,
        responses=errors(503) | document_errors(Cancelling, 400, 404),
    )
    async def cancel(app: str, request_id: str, request: Request) -> JSONResponse:
        """Cancels a request: a queued one at once, one in progress within a pass or a step."""
        try:
            job = await _find(services, app, request_id, request)
            if job.has_ended:
                return JSONResponse({"status": "ALREADY_COMPLETED"}, 400)
            await services.runner.cancel(job.owner, request_id)
        except NotFound:
            return JSONResponse({"status": "NOT_FOUND"}, 404)
        except Conflict:  # it has ended just now
            return JSONResponse({"status": "ALREADY_COMPLETED"}, 400)
        return JSONResponse({"status": "CANCELLATION_REQUESTED"}, 202)


def _add_uploads(routes: APIRouter, services: Services) -> None:
    @routes.post(
        "/storage/upload/initiate",
        name="fal_initiate_upload",
        responses=errors(408, 413, 422, 503),
        openapi_extra=document_body(UploadRequest),
    )
    async def initiate_upload(request: Request) -> Upload:
        """Returns a URL to upload an image to."""
        await read_json(request, UploadRequest, services.config.limits.max_json_bytes)
        name, expires, signature = await services.uploads.name()
        base = services.base(request)
        return Upload(
            upload_url=f"{base}/storage/upload/{name}?expires={expires}&signature={signature}",
            file_url=f"{base}/files/{name}",
        )

    @routes.put(
        "/storage/upload/{stem}.upload",
        name="fal_upload",
        responses=errors(403, 408, 409, 413, 422, 507),
        openapi_extra={"requestBody": {"content": {"image/*": {}}}},
    )
    async def upload(
        stem: str,
        request: Request,
        expires: Annotated[int, Query(ge=0, le=2**53)],
        signature: Annotated[str, Query(pattern="^[0-9a-f]{128}$")],
    ) -> Response:
        """Takes an image at the URL that was given for it."""
        await services.uploads.take(f"{stem}.upload", expires, signature, request.stream())
        return Response()
