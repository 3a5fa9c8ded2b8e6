"""fal's API: https://docs.fal.ai/model-endpoints. Run now, or queue a request and come back for its result.

fal's hosts are paths here: `fal.run` is `/`, `queue.fal.run` is `/queue`, `rest.fal.ai` is `/`. A request for
any host that begins with `queue.` is for the queue as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator  # noqa: TC003 - FastAPI reads the annotation
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders

from serve_app.dialects.bodies import CLIENT_CLOSED, JSONFields, document_body, document_errors, read_json
from serve_app.dialects.hosted import PARAMETERS, EditInput, ImageInput, InputReader
from serve_app.errors import NO_RETRY, InvalidParameter, RequestError, in_words
from serve_app.generation.delivery import error_of
from serve_app.jobs.runner import Submission
from serve_app.jobs.store import Job, Owner, Priority
from serve_app.jobs.webhooks import Message, Sign
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as ASGIMessage

    from serve_app.config import Limits
    from serve_app.files.uploads import Uploads
    from serve_app.generation.delivery import Delivered, Delivery
    from serve_app.generation.generator import Generator
    from serve_app.generation.orders import Order
    from serve_app.generation.request import PartialImage, StageProgress
    from serve_app.generation.sources import SourceReader
    from serve_app.http.links import Links
    from serve_app.jobs.runner import JobRunner
    from serve_app.jobs.store import JobStore

API = "fal"
"""What jobs of these routes are marked by."""
PATHS = ("/fal-ai/", "/queue/", "/storage/", "/api/fal/")
"""What all of this API's begin with."""
PROXY = "/api/fal/proxy"
HOSTS = {
    "fal.run": ("", "/fal-ai/"),
    "queue.fal.run": ("/queue", "/fal-ai/"),
    "rest.fal.ai": ("", "/storage/"),
}
"""Where a host's paths are here, and what those begin with that there are."""
TARGET = re.compile(
    rf"https://(?P<host>{'|'.join(map(re.escape, HOSTS))})(?P<path>/[!-~]*?)(\?(?P<query>[!-~]*))?"
)
REQUEST = re.compile(r"/requests/([0-9a-f-]{36})(/|$)")
REQUEST_ID = "x-fal-request-id"
RETRIED = (408, 409, 429, 502, 503)
"""By the clients, whatever the headers say; 504 is too, but for one header."""
NAMES = PARAMETERS | {"webhook_url": "fal_webhook"}
"""What this API calls parameters."""
PLACES = {"fal_webhook": "query", "logs": "query"}
"""Where parameters stand that are not in the body."""
ERROR_TYPES = {
    "missing_required_parameter": "missing",
    "unknown_parameter": "extra_forbidden",
    "unsupported_parameter": "extra_forbidden",
    "invalid_image_url": "file_download_error",
    "invalid_image": "image_load_error",
    "deadline_exceeded": "request_timeout",
    "start_timeout": "request_timeout",
    "content_policy_violation": "content_policy_violation",
    "stopping": "runner_scheduling_failure",
    "unavailable": "runner_scheduling_failure",
}
"""fal's words for what is wrong, where they are not this server's: https://docs.fal.ai/errors."""


class _Steps(JSONFields):
    num_inference_steps: int | None = Field(
        default=None, ge=10, le=100, description="Denoising steps; 30 if unset."
    )


class TextToImage(_Steps, ImageInput):
    """The input of `fal-ai/glm-image`."""


class ImageToImage(_Steps, EditInput):
    """The input of `fal-ai/glm-image/image-to-image`."""


class File(BaseModel):
    """An image."""

    url: str = Field(description="Where it is; a data URL with `sync_mode`.")
    content_type: str
    file_name: str
    file_size: int = Field(description="Bytes.")
    width: int
    height: int


class Timings(BaseModel):
    """How long it took."""

    inference: float = Field(description="Seconds for which the stages worked, at most, on one image.")


class Output(BaseModel):
    """What was made."""

    images: list[File]
    timings: Timings
    seed: int = Field(description="Of the first image.")
    has_nsfw_concepts: list[bool] = Field(
        description="Of each image whether it was flagged, and is black; false if nothing is checked."
    )
    prompt: str = Field(description="What was painted: the new prompt, if it was expanded.")


class Problem(BaseModel):
    """What is wrong with the request."""

    loc: list[str | int]
    msg: str
    type: str


class FalError(BaseModel):
    """The answer to a request that fails."""

    detail: str | list[Problem]
    error_type: str | None = None


class Log(BaseModel):
    """A line of the log."""

    timestamp: str
    level: Literal["INFO"] = "INFO"
    source: Literal["USER"] = "USER"
    message: str


class Metrics(BaseModel):
    """How long it took."""

    inference_time: float = Field(description="Seconds from its beginning to its end.")


class Queued(BaseModel):
    """How a request gets on."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"] = "IN_QUEUE"
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = Field(default=None, description="From 0, while it is queued.")


class Submitted(Queued):
    """A request that was taken on."""

    gateway_request_id: str


class Status(Queued):
    """How a request gets on."""

    logs: list[Log] | None = Field(
        default=None, description="Once it is in progress; empty unless asked for."
    )
    metrics: Metrics | None = Field(default=None, description="When it is completed.")
    error: str | None = Field(default=None, description="When it failed.")
    error_type: str | None = Field(default=None, description="When it failed.")


class Cancelling(BaseModel):
    """What becomes of a request that is to be cancelled."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class UploadRequest(JSONFields):
    """What is to be uploaded. Its first bytes tell what it is, whatever stands here."""

    content_type: str | None = Field(default=None, max_length=255)
    file_name: str | None = Field(default=None, max_length=1024)


class Upload(BaseModel):
    """Where to."""

    upload_url: str = Field(description="PUT the image there, once and within an hour; without a key.")
    file_url: str = Field(description="What to give as an input.")


def _kind(error: RequestError) -> str:
    """Fal's word for an error."""
    by_status = {400: "value_error", 500: "internal_error"}
    return ERROR_TYPES.get(error.code, by_status.get(error.status, error.code))


def error_response(error: RequestError | InvalidParameter) -> JSONResponse:
    """The error in this API's envelope."""
    error = in_words(error, NAMES)
    status, headers, kind = error.status, dict(error.headers), _kind(error)
    final = error.headers.get("x-should-retry") == "false"
    if status == 400:
        status = HTTPStatus.UNPROCESSABLE_ENTITY
    elif final and status == HTTPStatus.GATEWAY_TIMEOUT:
        headers["X-Fal-Request-Timeout-Type"] = "user"  # without which the clients would try again
    elif final and status in RETRIED:
        status = 500  # likewise
    headers |= {
        "X-Fal-Error-Type": kind,
        "X-Fal-Retryable": str(not final and status in (429, 503)).lower(),
    }
    if status != HTTPStatus.UNPROCESSABLE_ENTITY:
        return JSONResponse({"detail": error.message, "error_type": kind}, status, headers)
    name = error.param or ""
    place = "header" if name.lower().startswith("x-") else PLACES.get(name, "body")
    loc = [place, *(int(part) if part.isdigit() else part for part in name.split(".") if part)]
    return JSONResponse({"detail": [{"loc": loc, "msg": error.message, "type": kind}]}, status, headers)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in this API's envelope for each status."""
    return document_errors(FalError, 401, *statuses)


class Addresses:
    """Leads requests for fal's other hosts, and through its JavaScript client's proxy, to their routes here.

    It never asks another server. Every answer of this API gets the id of its request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or not _path(scope).startswith(PATHS):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def named(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                asked = REQUEST.search(_path(scope))
                request_id = asked[1] if asked else headers.get("x-request-id", "")
                MutableHeaders(raw=message["headers"]).setdefault(REQUEST_ID, request_id)
            await send(message)

        app = self._app
        if _path(scope) == PROXY:
            match = TARGET.fullmatch(headers.get("x-fal-target-url", ""))
            prefix, begins = HOSTS[match["host"]] if match else ("", "")
            if match and match["path"].startswith(begins):
                _lead(scope, prefix + match["path"], match["query"] or "")
            else:
                app = error_response(
                    RequestError(
                        f"x-fal-target-url leads to none of {', '.join(HOSTS)}, or to nothing that is here.",
                        param="x-fal-target-url",
                        code="precondition_failed",
                        status=412,
                    )
                )
        elif headers.get("host", "").startswith("queue.") and _path(scope).startswith("/fal-ai/"):
            _lead(scope, "/queue" + _path(scope), scope["query_string"].decode("latin-1"))
        await app(scope, receive, named)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _lead(scope: Scope, path: str, query: str) -> None:
    scope["path"] = scope.get("root_path", "") + path
    scope["raw_path"] = scope["path"].encode()
    scope["query_string"] = query.encode("latin-1")


class Views:
    """Puts jobs into words."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    async def result(self, job: Job, base: str) -> JSONResponse:
        """What running it at once would have answered."""
        if not job.has_ended:
            return JSONResponse({"detail": "Request is still in progress"}, 400)
        if job.state == "succeeded":
            made = await self._delivery.of(job, base, inline=job.answer["sync_mode"])
            return JSONResponse(_output(made).model_dump())
        return error_response(_error(job))

    async def message(self, job: Job, timestamp: int, sign: Sign) -> Message:
        """The webhook of an ended job: https://docs.fal.ai/model-endpoints/webhooks."""
        result = await self.result(job, job.answer["base_url"])
        failed = job.state != "succeeded"
        payload = json.dumps(
            {
                "request_id": job.id,
                "gateway_request_id": job.id,
                "status": "ERROR" if failed else "OK",
                "error": f"Invalid status code: {result.status_code}" if failed else None,
                "payload": json.loads(bytes(result.body)),
            }
        ).encode()
        user = job.key_id or "anonymous"
        signed = "\n".join((job.id, user, str(timestamp), hashlib.sha256(payload).hexdigest()))
        return Message(
            payload,
            {
                "Content-Type": "application/json",
                "X-Fal-Webhook-Request-Id": job.id,
                "X-Fal-Webhook-User-Id": user,
                "X-Fal-Webhook-Timestamp": str(timestamp),
                "X-Fal-Webhook-Signature": (await sign(signed.encode())).hex(),
            },
        )


def _error(job: Job) -> RequestError | InvalidParameter:
    """Why a job has made nothing."""
    if job.error:
        return error_of(job.error)
    return RequestError(
        "The request was cancelled.", code="client_cancelled", status=CLIENT_CLOSED, headers=NO_RETRY
    )


def _output(made: Sequence[Delivered]) -> Output:
    return Output(
        images=[
            File(
                url=one.data_url,
                content_type=one.media_type,
                file_name=one.facts["name"],
                file_size=one.facts["bytes"],
                width=one.facts["width"],
                height=one.facts["height"],
            )
            for one in made
        ],
        timings=Timings(inference=max(one.facts["prior_s"] + one.facts["decoder_s"] for one in made)),
        seed=made[0].facts["seed"],
        has_nsfw_concepts=[one.is_flagged for one in made],
        prompt=made[0].facts["prompt"],
    )


def _queued(job: Job, base: str) -> dict[str, Any]:
    """What all answers say of a job."""
    url = f"{base}/queue/fal-ai/{job.answer['app']}/requests/{job.id}"
    return {
        "request_id": job.id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "queue_position": job.position,
    }


def _status(job: Job, base: str, logs: list[dict[str, Any]]) -> Status:
    facts = _queued(job, base)
    if job.state == "queued":
        return Status(**facts)
    lines = [
        Log(timestamp=datetime.fromtimestamp(line["at"], UTC).isoformat(), message=line["message"])
        for line in logs
    ]
    if not job.has_ended:
        return Status(status="IN_PROGRESS", logs=lines, **facts)
    status = Status(
        status="COMPLETED",
        logs=lines,
        metrics=Metrics(inference_time=(job.ended_at or 0) - (job.started_at or job.ended_at or 0)),
        **facts,
    )
    if job.state != "succeeded":
        error = in_words(_error(job), NAMES)
        status.error, status.error_type = error.message, _kind(error)
    return status


Seconds = Annotated[
    float | None,
    Header(
        alias="X-Fal-Request-Timeout",
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the request fails if its work has not begun.",
    ),
]
_EVENTS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/FalError"}}},
    }
    for status in (401, 404, 422, 503)
}


def router(
    generator: Generator,
    delivery: Delivery,
    runner: JobRunner,
    store: JobStore,
    sources: SourceReader,
    views: Views,
    uploads: Uploads,
    links: Links,
    limits: Limits,
) -> APIRouter:
    """The routes of this API."""
    routes = APIRouter()

    reader = InputReader(generator, sources, limits, API, blacken=True)

    def add_app(path: str, fields_type: type[ImageInput], name: str) -> None:
        """The routes that run and queue what takes these fields."""

        @routes.post(
            f"/fal-ai/{{app}}{path}",
            name=f"fal_run_{name}",
            response_model=Output,
            responses=errors(404, 408, 413, 422, 429, 500, 503, 504, 507),
            openapi_extra=reader.document(fields_type),
        )
        async def run(app: str, request: Request, start_within_s: Seconds = None) -> Output:
            """Make images while the client waits."""
            fields, ordered = await reader.read(request, fields_type, app)
            made = await _begun_within(
                start_within_s, delivery, request, ordered, inline=fields.sync_mode or False
            )
            return _output(made)

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
            fal_webhook: Annotated[str | None, Query(description="Where to POST the result.")] = None,
            priority: Annotated[
                Priority, Header(alias="X-Fal-Queue-Priority", description="`low`: when there are no others.")
            ] = "normal",
        ) -> Submitted:
            """Queue a request."""
            fields, ordered = await reader.read(request, fields_type, app)
            base = links.base(request)
            job, _ = await runner.submit(
                Submission(
                    order=ordered,
                    api=API,
                    answer={"app": app, "sync_mode": fields.sync_mode or False},
                    base_url=base,
                    priority=priority,
                    start_within_s=start_within_s,
                    webhook_url=fal_webhook,
                )
            )
            telemetry.note_job(request, job)
            response.headers[REQUEST_ID] = job.id
            return Submitted(gateway_request_id=job.id, **_queued(job, base))

    add_app("", TextToImage, "image")
    add_app("/image-to-image", ImageToImage, "edit")

    queued = "/queue/fal-ai/{app}/requests/{request_id}"

    def owner(request: Request) -> Owner:
        return Owner(request.state.key_id, API)

    async def find(app: str, request_id: str, request: Request) -> Job:
        job = await store.get(owner(request), request_id)
        if job.answer["app"] != app:
            raise RequestError("The app has no such request.", code="not_found", status=404)
        return job

    @routes.get(
        f"{queued}/status",
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
        """How a request gets on."""
        response.status_code = 200 if job.has_ended else 202
        return _status(job, links.base(request), job.log if logs else [])

    @routes.get(
        f"{queued}/status/stream", name="fal_stream", response_class=EventSourceResponse, responses=_EVENTS
    )
    async def stream(
        request: Request,
        job: Job = Depends(find),
        logs: Annotated[bool, Query(description="Whether to send the log's new lines.")] = False,
    ) -> AsyncIterator[ServerSentEvent]:
        """The status whenever it has changed, until the request has completed."""
        told = 0
        try:
            async for seen in store.watch(owner(request), job.id):
                news = seen.log[told:] if logs else []
                told = len(seen.log)
                view = _status(seen, links.base(request), news)
                yield ServerSentEvent(raw_data=view.model_dump_json(exclude_none=True))
        except RequestError as error:  # the status has been sent, and events of errors there are none
            telemetry.note_error(request, error.code)

    @routes.get(
        queued,
        name="fal_result",
        response_model=Output,
        responses=errors(400, 404, 410, 422, CLIENT_CLOSED, 500, 503, 504),
    )
    async def result(request: Request, job: Job = Depends(find)) -> JSONResponse:
        """What running it at once would have answered."""
        return await views.result(job, links.base(request))

    @routes.put(
        f"{queued}/cancel",
        name="fal_cancel",
        status_code=202,
        response_model=Cancelling,
        responses=errors(503) | document_errors(Cancelling, 400, 404),
    )
    async def cancel(app: str, request_id: str, request: Request) -> JSONResponse:
        """Cancel a request: a queued one at once, one in progress within a token or a step."""
        try:
            job = await find(app, request_id, request)
            if job.has_ended:
                return _cancelling("ALREADY_COMPLETED", 400)
            await runner.cancel(owner(request), request_id)
        except RequestError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return _cancelling("NOT_FOUND", 404)
            if error.status == HTTPStatus.CONFLICT:  # it has ended just now
                return _cancelling("ALREADY_COMPLETED", 400)
            raise
        return _cancelling("CANCELLATION_REQUESTED", 202)

    @routes.post(
        "/storage/upload/initiate",
        name="fal_initiate_upload",
        responses=errors(408, 413, 422, 503),
        openapi_extra=document_body(UploadRequest),
    )
    async def initiate_upload(request: Request) -> Upload:
        """An address to upload an image to."""
        await read_json(request, UploadRequest, limits.max_json_bytes)
        name, expires, signature = await uploads.name()
        base = links.base(request)
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
        """Upload an image to the address that was given for it."""
        await uploads.take(f"{stem}.upload", expires, signature, request.stream())
        return Response()

    return routes


def _cancelling(status: str, code: int) -> JSONResponse:
    return JSONResponse({"status": status}, code)


async def _begun_within(
    start_within_s: float | None, delivery: Delivery, request: Request, ordered: Order, *, inline: bool
) -> list[Delivered]:
    """What is made, if a stage begins with it in so many seconds.

    Raises:
        RequestError: 504, none did.
    """
    timeout = asyncio.timeout(start_within_s)

    def report(_: StageProgress | PartialImage | object) -> None:
        if not timeout.expired():
            timeout.reschedule(None)

    try:
        async with timeout:
            return await delivery.make(request, ordered, inline=inline, report=report)
    except TimeoutError:
        if not timeout.expired():
            raise
        raise RequestError(
            f"The request was not begun within {start_within_s:g} s.",
            code="start_timeout",
            status=504,
            headers=NO_RETRY,
        ) from None
