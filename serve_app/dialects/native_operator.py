"""The operator's own routes: all that the server does, for all API keys. They show no prompts or images."""

from __future__ import annotations

import csv
import io
import time
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from serve_app.dialects.bodies import JSONFields, document_body, read_json
from serve_app.dialects.native import Loaded, by_kind
from serve_app.dialects.openai.schemas import errors
from serve_app.http.auth import require_operator
from serve_app.jobs import reports
from serve_app.jobs.tables import Priority, State
from serve_app.observability.recent import DAY_S, DAYS, day_of

if TYPE_CHECKING:
    from serve_app.http.services import Services
    from serve_app.jobs.tables import Job

PATH = "/v1/internal/operator"
JOB_PATH = PATH + "/jobs/{job_id}"


class Replica(BaseModel):
    """A replica of a stage."""

    model: str
    stage: str
    state: Literal["loading", "ready", "failed"]
    device: str | None = Field(default=None, description="Name of its GPU, or `CPU`. Unset before it loads.")
    memory: dict[str, int] | None = Field(
        default=None, description="Bytes by kind, as in the metric `image_server_memory_bytes`."
    )


class OperatorsJob(BaseModel):
    """A job of any key and any API."""

    id: str
    key_id: str = Field(description="Id of its API key; empty without one.")
    api: str = Field(description="API by which it was submitted.")
    model: str
    size: str
    n: int
    state: State
    cancelling: bool = Field(description="Whether it is running and was cancelled.")
    priority: Priority
    age_s: float = Field(description="Seconds since its submission, by the clock of the ingress.")


class JobChange(JSONFields):
    """Change of a queued job."""

    priority: Priority


class ErrorSeen(BaseModel):
    """An error that a client got."""

    at: float = Field(description="Seconds since 1970.")
    request_id: str
    key_id: str = Field(description="Id of the request's API key; empty without one.")
    api: str
    code: str
    status: int


class Files(BaseModel):
    """The file store."""

    bytes: int | None = Field(
        default=None, description="Bytes of all files at the last sweep; unset before the first one."
    )
    max_bytes: int = Field(description="Limit, `storage.max_bytes`.")


class Usage(BaseModel):
    """Work for an API key on a day."""

    day: str = Field(description="Day by UTC, as YYYY-MM-DD.")
    key_id: str
    source: Literal["jobs", "requests"] = Field(
        description="`jobs`: jobs that have succeeded and are still kept. `requests`: other requests that "
        "have succeeded, in the ingress replica that answers, since its start."
    )
    requests: int
    images: int
    megapixel_steps: float = Field(description="Megapixels of an image × denoising steps × images.")


class Overview(Loaded):
    """Everything that the server does."""

    replicas: list[Replica] = Field(description="Replicas of the stages, as they last reported.")
    jobs: list[OperatorsJob] = Field(description="Unfinished jobs of all keys and APIs, the oldest first.")
    errors: list[ErrorSeen] = Field(
        description="The last 50 errors of the ingress replica that answers, the newest first. Errors below "
        "500 of requests without a valid key are left out, unless the server needs no key."
    )
    files: Files
    usage: list[Usage] = Field(
        description="Work of the last 30 days, the newest day first; that of jobs may be a minute old."
    )


def router(services: Services) -> APIRouter:
    """Returns the operator's routes."""
    routes = APIRouter(tags=["Operator"], dependencies=[Depends(require_operator)])
    jobs = reports.WorkOfJobs(services.database)

    @routes.get(PATH, name="operator", response_model_exclude_none=True, responses=errors(403, 503))
    async def overview() -> Overview:
        """Returns the stages, the unfinished jobs, the last errors, the files, and the usage of each key."""
        return Overview(
            **by_kind(services, await services.lifecycle.statuses()),
            replicas=[
                Replica(model=model, stage=stage, **report)
                for model, stage, report in await services.lifecycle.reports()
            ],
            jobs=[_describe(job) for job in await reports.unfinished(services.database)],
            errors=[ErrorSeen(**error._asdict()) for error in reversed(services.recent.errors)],
            files=Files(bytes=services.files.kept_bytes, max_bytes=services.files.max_bytes),
            usage=await _usage(services, jobs),
        )

    @routes.get(
        f"{PATH}/usage.csv",
        name="operator_usage",
        response_class=Response,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}, **errors(403, 503)},
    )
    async def usage() -> Response:
        """Returns the usage of each key as a table."""
        table = io.StringIO()
        writer = csv.DictWriter(table, list(Usage.model_fields))
        writer.writeheader()
        writer.writerows(row.model_dump() for row in await _usage(services, jobs))
        return Response(table.getvalue(), media_type="text/csv")

    @routes.delete(JOB_PATH, name="operator_cancel", responses=errors(403, 404, 409, 503))
    async def cancel(job_id: str) -> OperatorsJob:
        """Cancels a job of any key: a queued one at once, a running one within a pass or a step."""
        return _describe(await services.runner.cancel(None, job_id))

    @routes.patch(
        JOB_PATH,
        name="operator_change",
        responses=errors(400, 403, 404, 408, 409, 413, 429, 503),
        openapi_extra=document_body(JobChange),
    )
    async def change(job_id: str, request: Request) -> OperatorsJob:
        """Changes the priority of a queued job of any key. It gets the turn of a new job."""
        change = await read_json(request, JobChange, services.config.limits.max_json_bytes)
        return _describe(await services.jobs.prioritize(job_id, change.priority))

    return routes


def _describe(job: Job) -> OperatorsJob:
    same = ("id", "key_id", "api", "model", "state", "cancelling", "priority")
    facts: dict[str, Any] = {name: getattr(job, name) for name in same}
    width, height = job.request.size
    age_s = round(max(0, time.time() - job.created_at), 1)
    return OperatorsJob(**facts, size=f"{width}x{height}", n=job.request.n, age_s=age_s)


async def _usage(services: Services, jobs: reports.WorkOfJobs) -> list[Usage]:
    sources = {"jobs": await jobs.by_day(), "requests": services.recent.work}
    oldest = day_of(time.time() - DAYS * DAY_S)
    rows = [
        Usage(
            day=day,
            key_id=key_id,
            source=source,
            requests=work.requests,
            images=work.images,
            megapixel_steps=round(work.megapixel_steps, 3),
        )
        for source, found in sources.items()
        for (day, key_id), work in found.items()
        if day > oldest
    ]
    return sorted(rows, key=lambda row: (row.day, row.key_id, row.source), reverse=True)
