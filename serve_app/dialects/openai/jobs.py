"""Generations and edits as jobs, for whoever need not wait: this server's own routes.

A job is submitted in the words of the OpenAI image API, which its result has too. It goes on whatever becomes
of the client, the connection, or this server.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator  # noqa: TC003 - FastAPI reads the annotation
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from serve_app.dialects.bodies import media_type
from serve_app.dialects.openai.routes import error_body, error_response
from serve_app.dialects.openai.schemas import (
    EditJobForm,
    Error,
    ImagesResponse,
    JobRequest,
    errors,
    images_response,
    job_body,
)
from serve_app.errors import RequestError
from serve_app.generation.delivery import error_of
from serve_app.jobs.runner import Submission
from serve_app.jobs.store import Job, Owner, Priority, State
from serve_app.jobs.webhooks import TRIES, Message, Sign
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from serve_app.config import Limits
    from serve_app.dialects.openai.parse import Asked, RequestReader
    from serve_app.generation.delivery import Delivery
    from serve_app.generation.generator import Generator
    from serve_app.http.links import Links
    from serve_app.jobs.runner import JobRunner
    from serve_app.jobs.signing import Signer
    from serve_app.jobs.store import JobStore

API = "images"
"""What jobs of these routes are marked by."""
PATH = "/v1/images/jobs"


class ImageProgress(BaseModel):
    """How far one image is."""

    stage: Literal["waiting", "prior", "decoder"]
    done: int | None = Field(default=None, description="Tokens drawn or read, or denoising steps made.")
    total: int | None = Field(default=None, description="Of how many.")


class JobPreview(BaseModel):
    """What an image is going to look like."""

    image: int = Field(description="Which image, from 0.")
    index: int = Field(description="Which of its previews, from 0.")
    url: str = Field(description="Until the job has ended.")


class LogLine(BaseModel):
    """What happened to a job."""

    at: float = Field(description="Seconds since 1970.")
    message: str


class JobWebhook(BaseModel):
    """How telling of the job's end gets on."""

    state: Literal["waiting", "delivered", "given up"]
    attempts: int


class JobSummary(BaseModel):
    """A job, as lists have it."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: State
    model: str
    priority: Priority
    n: int
    size: str
    seed: int = Field(description="Of the first image.")
    created_at: int = Field(description="Seconds since 1970, as the others.")
    started_at: int | None = None
    ended_at: int | None = None
    expires_at: int | None = Field(default=None, description="When the job and its images are deleted.")
    queue_position: int | None = Field(
        default=None, description="While it is queued: how many jobs for its model are to begin before it."
    )
    progress: float = Field(description="0 to 1; each stage is half of an image.")
    cancelling: bool | None = Field(default=None, description="While it runs and is being stopped.")
    error: Error | None = None
    webhook: JobWebhook | None = None


class JobView(JobSummary):
    """A job and, when it has succeeded, its images."""

    images: list[ImageProgress] | None = Field(default=None, description="While it runs.")
    previews: list[JobPreview] | None = Field(default=None, description="While it runs.")
    log: list[LogLine]
    result: ImagesResponse | None = Field(default=None, description="As a generation or an edit answers.")


class JobList(BaseModel):
    """Some jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobSummary]
    has_more: bool = Field(description="Whether there are older ones.")


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=20, ge=1, le=100, description="How many.")
    after: str | None = Field(default=None, max_length=64, description="The last id of the page before.")
    status: State | None = Field(default=None, description="Those in this state alone.")


_EVENT_ERRORS: dict[int | str, dict[str, Any]] = {  # which FastAPI would take for events
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    for status in (400, 404, 503)
}


class Views:
    """Puts jobs into words."""

    def __init__(self, delivery: Delivery, links: Links) -> None:
        self._delivery = delivery
        self._links = links

    async def whole(self, job: Job, base: str) -> JobView:
        """The job and its images, with URLs below `base`.

        Raises:
            RequestError: 410, its images are to be in the answer and are gone.
        """
        runs = job.state == "running"
        return JobView(
            **dict(summary(job)),
            images=[
                ImageProgress(**image or {"stage": "waiting"})
                for image in job.progress or [None] * job.request["n"]
            ]
            if runs
            else None,
            previews=[
                JobPreview(
                    image=one["image"], index=one["index"], url=await self._links.file(base, one["name"])
                )
                for one in job.previews
            ]
            if runs
            else None,
            log=[LogLine(**line) for line in job.log],
            result=await self._result(job, base) if job.state == "succeeded" else None,
        )

    async def _result(self, job: Job, base: str) -> ImagesResponse:
        inline = job.answer["response_format"] == "b64_json"
        made = await self._delivery.of(job, base, inline=inline)
        return images_response(made, job.answer["quality"], job.encoding["format"], job.ended_at or 0)

    async def message(self, job: Job, timestamp: int, sign: Sign) -> Message:
        """The webhook of an ended job: https://www.standardwebhooks.com, with asymmetric signatures."""
        view = await self.whole(job, job.answer["base_url"])
        body = json.dumps(
            {
                "type": f"image.job.{job.state}",
                "timestamp": timestamp,
                "data": view.model_dump(exclude_none=True, exclude={"webhook"}),
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


def summary(job: Job) -> JobSummary:
    """The job without its images."""
    width, height = job.request["size"]
    times = {name: getattr(job, name) for name in ("created_at", "started_at", "ended_at", "expires_at")}
    return JobSummary(
        id=job.id,
        status=job.state,
        model=job.model,
        priority=job.priority,
        n=job.request["n"],
        size=f"{width}x{height}",
        seed=job.request["seed"],
        queue_position=job.position,
        progress=_progress(job),
        cancelling=True if job.cancelling and job.state == "running" else None,
        error=error_body(error_of(job.error)) if job.error else None,
        webhook=_webhook(job) if job.webhook_url else None,
        **{name: time and int(time) for name, time in times.items()},
    )


def _progress(job: Job) -> float:
    if job.state == "succeeded":
        return 1
    halves = sum(
        int(image["stage"] == "decoder") + image["done"] / max(image["total"], 1)
        for image in job.progress
        if image
    )
    return round(float(halves) / 2 / int(job.request["n"]), 3)


def _webhook(job: Job) -> JobWebhook:
    state: Literal["waiting", "delivered", "given up"] = "waiting"
    if job.webhook_delivered_at:
        state = "delivered"
    elif job.has_ended and (job.webhook_at is None or job.webhook_attempts >= TRIES):
        state = "given up"
    return JobWebhook(state=state, attempts=job.webhook_attempts)


def router(
    generator: Generator,
    runner: JobRunner,
    store: JobStore,
    reader: RequestReader,
    views: Views,
    links: Links,
    signer: Signer,
    limits: Limits,
) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post(
        PATH,
        status_code=202,
        response_model=JobView,
        response_model_exclude_none=True,
        responses=errors(400, 404, 408, 409, 413, 429, 500, 503, 507),
        openapi_extra=job_body(generator, limits),
    )
    async def submit_job(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(
                min_length=1,
                max_length=255,
                description="A second job with the same one is the first one, and made once.",
            ),
        ] = None,
    ) -> JobView:
        """Submit a generation or an edit, and come back for it later."""
        asked: Asked[JobRequest] | Asked[EditJobForm]
        if media_type(request) == "application/json":
            asked = await reader.json(request, JobRequest, limits.max_body_bytes)
        else:
            asked = await reader.form(request, EditJobForm)
        fields = asked.fields
        if fields.stream:
            raise RequestError(f"A job does not stream; follow it at {PATH}/ID/events.", param="stream")
        base = links.base(request)
        with asked.naming_sources():
            job, is_new = await runner.submit(
                Submission(
                    order=asked.order,
                    api=API,
                    answer={"quality": asked.quality, "response_format": fields.response_format},
                    base_url=base,
                    priority=fields.priority or "normal",
                    start_within_s=fields.start_within_s,
                    idempotency_key=idempotency_key,
                    webhook_url=fields.webhook_url,
                )
            )
        telemetry.note_job(request, job)
        response.headers["Location"] = f"{base}{PATH}/{job.id}"
        if not is_new:
            response.headers["Idempotent-Replayed"] = "true"
        return await views.whole(job, base)

    @routes.get(PATH, response_model_exclude_none=True, responses=errors(400, 404, 503))
    async def list_jobs(query: Annotated[ListQuery, Query()], request: Request) -> JobList:
        """Your jobs, the newest first."""
        found = await store.page(owner(request), limit=query.limit + 1, after=query.after, state=query.status)
        return JobList(data=[summary(job) for job in found[: query.limit]], has_more=len(found) > query.limit)

    def owner(request: Request) -> Owner:
        return Owner(request.state.key_id, API)

    async def find(job_id: str, request: Request) -> Job:
        return await store.get(owner(request), job_id)

    @routes.get(PATH + "/{job_id}", response_model_exclude_none=True, responses=errors(404, 410, 503))
    async def get_job(request: Request, job: Job = Depends(find)) -> JobView:
        """How a job gets on, and its images when it has succeeded."""
        return await views.whole(job, links.base(request))

    @routes.get(PATH + "/{job_id}/events", response_class=EventSourceResponse, responses=_EVENT_ERRORS)
    async def job_events(
        request: Request,
        job: Job = Depends(find),
        last_event_id: Annotated[
            str, Header(max_length=64, description="Of the last one that came: what has changed since.")
        ] = "",
    ) -> AsyncIterator[ServerSentEvent]:
        """The job whenever something about it has changed, as an event by the name of its status."""
        try:
            async for seen in store.watch(owner(request), job.id, last_event_id):
                view = await views.whole(seen, links.base(request))
                yield ServerSentEvent(
                    event=seen.state, id=seen.mark, raw_data=view.model_dump_json(exclude_none=True)
                )
        except RequestError as error:  # the status has been sent
            telemetry.note_error(request, error.code)
            yield ServerSentEvent(event="error", raw_data=bytes(error_response(error).body).decode())

    @routes.delete(PATH + "/{job_id}", response_model_exclude_none=True, responses=errors(404, 409, 503))
    async def cancel_job(job_id: str, request: Request) -> JobView:
        """Cancel a job: a queued one at once, a running one within a token or a step."""
        job = await runner.cancel(owner(request), job_id)
        return await views.whole(job, links.base(request))

    @routes.post(PATH + "/{job_id}/purge", response_model_exclude_none=True, responses=errors(404, 409, 503))
    async def purge_job(job_id: str, request: Request) -> JobSummary:
        """Delete a job that has ended, and its images, now; they would be kept until it expires."""
        return summary(await runner.purge(owner(request), job_id))

    @routes.get("/.well-known/jwks.json", responses=errors(503))
    async def signing_keys() -> dict[str, Any]:
        """The public keys by which webhooks are signed: https://www.rfc-editor.org/rfc/rfc7517."""
        return await signer.jwks()

    return routes
