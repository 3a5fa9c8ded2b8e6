"""Jobs: generations and edits that survive the client, the connection and the server.

The routes are this server's own. A job is submitted, and answered, in the words of the OpenAI image API.
"""

from __future__ import annotations

import base64
import json
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from serve_app.dialects.bodies import media_type
from serve_app.dialects.openai.errors import error_body, error_response
from serve_app.dialects.openai.openapi import job_body
from serve_app.dialects.openai.parse import parse_form, parse_json
from serve_app.dialects.openai.schemas import (
    EditJobForm,
    Error,
    ImagesResponse,
    JobRequest,
    errors,
    images_response,
)
from serve_app.errors import Invalid, RequestError
from serve_app.http import sse
from serve_app.http.errors import status_of
from serve_app.jobs.submission import Submission
from serve_app.jobs.tables import Job, Owner, Priority, State
from serve_app.jobs.webhooks import MAX_TRIES, Message, Sign
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from serve_app.dialects.openai.parse import Parsed
    from serve_app.http.services import Services
    from serve_app.jobs.webhooks import Compose

API = "images"
"""The `api` of jobs of these routes."""
PATH = "/v1/images/jobs"


class ImageProgress(BaseModel):
    """Progress of one image."""

    stage: Literal["waiting", "prior", "decoder"]
    done: int | None = Field(default=None, description="Tokens generated or read, or denoising steps.")
    total: int | None = Field(default=None, description="Number of tokens or steps in all.")


class JobPreview(BaseModel):
    """A preview of an image."""

    image: int = Field(description="Index of the image, from 0.")
    index: int = Field(description="Index of the preview, from 0.")
    url: str = Field(description="Valid until the job has ended.")


class JobLogLine(BaseModel):
    """A message about a job."""

    at: float = Field(description="Seconds since 1970.")
    message: str


class JobWebhook(BaseModel):
    """State of the webhook's delivery."""

    state: Literal["waiting", "delivered", "given up"]
    attempts: int


class JobSummary(BaseModel):
    """A job without its images."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: State
    model: str
    priority: Priority
    n: int
    size: str
    seed: int = Field(description="Seed of the first image.")
    created_at: int = Field(description="Seconds since 1970, as all times.")
    started_at: int | None = None
    ended_at: int | None = None
    expires_at: int | None = Field(
        default=None, description="Time at which the job and its images are deleted."
    )
    queue_position: int | None = Field(
        default=None, description="While it is queued: number of jobs for its model that begin before it."
    )
    waiting_for: str | None = Field(
        default=None,
        description="Set while a queued job waits for its model, or for the file storage.",
    )
    progress: float = Field(description="0 to 1. Each stage is half of an image.")
    cancelling: bool | None = Field(default=None, description="Set while it runs and is being stopped.")
    error: Error | None = None
    webhook: JobWebhook | None = None


class JobView(JobSummary):
    """A job with its images, once it has succeeded."""

    images: list[ImageProgress] | None = Field(default=None, description="Set while it runs.")
    previews: list[JobPreview] | None = Field(default=None, description="Set while it runs.")
    log: list[JobLogLine]
    result: ImagesResponse | None = Field(default=None, description="The answer of a generation or an edit.")


class JobList(BaseModel):
    """A page of jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobSummary]
    has_more: bool = Field(description="Whether there are older jobs.")


class ListQuery(BaseModel):
    """Selection of jobs."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=20, ge=1, le=100, description="Most jobs of the page.")
    after: str | None = Field(default=None, max_length=64, description="Last id of the previous page.")
    status: State | None = Field(default=None, description="Only jobs in this state.")


async def view(services: Services, job: Job, base: str) -> JobView:
    """Returns a job with its images, as URLs below `base`.

    Raises:
        Gone: its images are to be in the answer, and were deleted.
    """
    runs = job.state == "running"
    shown = summary(services, job)
    log = [JobLogLine(at=line.at, message=line.message) for line in job.log]
    if shown.waiting_for:
        log.append(JobLogLine(at=job.created_at, message=shown.waiting_for))
    return JobView(
        **dict(shown),
        images=[
            ImageProgress(stage=image.stage, done=image.done, total=image.total)
            if image
            else ImageProgress(stage="waiting")
            for image in job.progress or [None] * job.request.n
        ]
        if runs
        else None,
        previews=[
            JobPreview(image=one.image, index=one.index, url=await services.files.url(base, one.name))
            for one in job.previews
        ]
        if runs
        else None,
        log=log,
        result=await _result(services, job, base) if job.state == "succeeded" else None,
    )


async def _result(services: Services, job: Job, base: str) -> ImagesResponse:
    image_format = job.encoding.format
    where = None if job.answer["response_format"] == "b64_json" else base
    made = await services.delivery.kept(job.images, image_format, where)
    return images_response(made, job.answer["quality"], image_format, job.ended_at or 0)


def compose(services: Services) -> Compose:
    """Returns the function that composes webhook messages: https://www.standardwebhooks.com."""

    async def message(job: Job, timestamp: int, sign: Sign) -> Message:
        shown = await view(services, job, job.answer["base_url"])
        body = json.dumps(
            {
                "type": f"image.job.{job.state}",
                "timestamp": timestamp,
                "data": shown.model_dump(exclude_none=True, exclude={"webhook"}),
            }
        ).encode()
        signature = base64.b64encode(await sign(f"{job.id}.{timestamp}.".encode() + body)).decode()
        return Message(
            body,
            {
                "Content-Type": "application/json",
                "webhook-id": job.id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": f"v1a,{signature}",
            },
        )

    return message


def summary(services: Services, job: Job) -> JobSummary:
    """Returns a job without its images."""
    width, height = job.request.size
    times = {name: getattr(job, name) for name in ("created_at", "started_at", "ended_at", "expires_at")}
    return JobSummary(
        id=job.id,
        status=job.state,
        model=job.model,
        priority=job.priority,
        n=job.request.n,
        size=f"{width}x{height}",
        seed=job.request.seed,
        queue_position=job.position,
        waiting_for=services.runner.waits_for(job),
        progress=_progress(job),
        cancelling=True if job.cancelling and job.state == "running" else None,
        error=error_body(job.error.as_error()) if job.error else None,
        webhook=_webhook(job) if job.webhook_url else None,
        **{name: time and int(time) for name, time in times.items()},
    )


def _progress(job: Job) -> float:
    if job.state == "succeeded":
        return 1
    halves = sum(
        int(image.stage == "decoder") + image.done / max(image.total, 1) for image in job.progress if image
    )
    return round(halves / 2 / job.request.n, 3)


def _webhook(job: Job) -> JobWebhook:
    state: Literal["waiting", "delivered", "given up"] = "waiting"
    # The last try counts before it begins. It has until `webhook_at`.
    is_hopeless = job.webhook_attempts >= MAX_TRIES and (job.webhook_at or 0) < time.time()
    if job.webhook_delivered_at:
        state = "delivered"
    elif job.has_ended and (job.webhook_at is None or is_hopeless):
        state = "given up"
    return JobWebhook(state=state, attempts=job.webhook_attempts)


def router(services: Services) -> APIRouter:
    """Returns the routes of jobs."""
    routes = APIRouter(tags=["Jobs"])
    _add_submission(routes, services)
    _add_reading(routes, services)
    _add_ending(routes, services)

    @routes.get("/.well-known/jwks.json", responses=errors(503))
    async def signing_keys() -> dict[str, Any]:
        """Returns the public keys of webhooks: https://www.rfc-editor.org/rfc/rfc7517."""
        return await services.signer.jwks()

    return routes


def _owner(request: Request) -> Owner:
    return Owner(request.state.key_id, API)


def _add_submission(routes: APIRouter, services: Services) -> None:
    limits = services.config.limits

    @routes.post(
        PATH,
        status_code=202,
        response_model=JobView,
        response_model_exclude_none=True,
        responses=errors(400, 404, 408, 409, 413, 429, 500, 503, 507),
        openapi_extra=job_body(services.generator, limits),
    )
    async def submit_job(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(
                min_length=1,
                max_length=255,
                description="A second job with the same key is the first one, and is made once.",
            ),
        ] = None,
    ) -> JobView:
        """Submits a generation or an edit as a job."""
        parsed: Parsed[JobRequest] | Parsed[EditJobForm]
        if media_type(request) == "application/json":
            parsed = await parse_json(request, JobRequest, limits, limits.max_body_bytes)
        else:
            parsed = await parse_form(request, EditJobForm, limits)
        fields = parsed.fields
        if fields.stream:
            raise Invalid(f"A job does not stream; follow it at {PATH}/ID/events.", param="stream")
        base = services.base(request)
        job, is_new = await services.submitter.submit(
            Submission(
                request=parsed.request,
                api=API,
                base_url=base,
                answer={"quality": parsed.quality, "response_format": fields.response_format},
                priority=fields.priority or "normal",
                idempotency_key=idempotency_key,
                webhook_url=fields.webhook_url,
            )
        )
        telemetry.note_job(job)
        response.headers["Location"] = f"{base}{PATH}/{job.id}"
        if not is_new:
            response.headers["Idempotent-Replayed"] = "true"
        return await view(services, job, base)


def _add_reading(routes: APIRouter, services: Services) -> None:
    store = services.jobs

    @routes.get(PATH, response_model_exclude_none=True, responses=errors(400, 404, 503))
    async def list_jobs(query: Annotated[ListQuery, Query()], request: Request) -> JobList:
        """Lists your jobs, the newest first."""
        found = await store.page(
            _owner(request), limit=query.limit + 1, after=query.after, state=query.status
        )
        return JobList(
            data=[summary(services, job) for job in found[: query.limit]], has_more=len(found) > query.limit
        )

    async def find(job_id: str, request: Request) -> Job:
        return await store.get(_owner(request), job_id)

    @routes.get(PATH + "/{job_id}", response_model_exclude_none=True, responses=errors(404, 410, 503))
    async def get_job(request: Request, job: Job = Depends(find)) -> JobView:
        """Returns a job, with its images when it has succeeded."""
        return await view(services, job, services.base(request))

    @routes.get(
        PATH + "/{job_id}/events", response_class=Response, responses=sse.DOCUMENT | errors(400, 404, 503)
    )
    async def job_events(
        request: Request,
        job: Job = Depends(find),
        last_event_id: Annotated[
            str,
            Header(max_length=64, description="Id of the last event received: only later changes follow."),
        ] = "",
    ) -> sse.EventStream:
        """Sends the job at every change, as an event named by its status."""
        return await sse.EventStream.begin(lambda _: _events(services, request, job, last_event_id))


async def _events(
    services: Services, request: Request, job: Job, last_event_id: str
) -> AsyncGenerator[sse.SSEEvent | None, None]:
    """Yields the events of a job; see `EventStream.begin`."""
    yield None
    try:
        async with aclosing(services.jobs.watch(job.owner, job.id, last_event_id)) as changes:
            async for seen in changes:
                shown = await view(services, seen, services.base(request))
                yield sse.SSEEvent(
                    name=seen.state,
                    id=seen.mark,
                    data=shown.model_dump_json(exclude_none=True),
                    is_last=seen.has_ended,
                )
    except RequestError as error:  # the status has been sent
        telemetry.note_error(error.code, status_of(error))
        body = bytes(error_response(error, request.scope).body).decode()
        yield sse.SSEEvent(name="error", data=body, is_last=True)


def _add_ending(routes: APIRouter, services: Services) -> None:
    @routes.delete(PATH + "/{job_id}", response_model_exclude_none=True, responses=errors(404, 409, 503))
    async def cancel_job(job_id: str, request: Request) -> JobView:
        """Cancels a job: a queued one at once, a running one within a pass or a step."""
        job = await services.runner.cancel(_owner(request), job_id)
        return await view(services, job, services.base(request))

    @routes.post(PATH + "/{job_id}/purge", response_model_exclude_none=True, responses=errors(404, 409, 503))
    async def purge_job(job_id: str, request: Request) -> JobSummary:
        """Deletes an ended job and its images now, before they expire."""
        return summary(services, await services.runner.purge(_owner(request), job_id))
