"""Jobs in fal's words: their status, result and webhook.

A failed job is `COMPLETED`, because the clients know no other end. Its result is the error, and its webhook
has the status `ERROR`.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from serve_app.dialects.fal.errors import NAMES, error_response, type_of
from serve_app.dialects.fal.schemas import File, Log, Metrics, Output, Status, StatusName, Timings
from serve_app.errors import Cancelled, RequestError
from serve_app.http.errors import status_of
from serve_app.jobs.webhooks import Message, Sign
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve_app.generation.delivery import Delivered
    from serve_app.http.services import Services
    from serve_app.jobs.records import LogLine
    from serve_app.jobs.tables import Job, State
    from serve_app.jobs.webhooks import Compose


STATUSES: dict[State, StatusName] = {
    "queued": "IN_QUEUE",
    "running": "IN_PROGRESS",
    "succeeded": "COMPLETED",
    "failed": "COMPLETED",
    "cancelled": "COMPLETED",
}


def output(made: Sequence[Delivered]) -> Output:
    """Returns the answer with these images."""
    first = made[0].record
    return Output(
        images=[
            File(
                url=one.data_url,
                content_type=one.media_type,
                file_name=one.record.name,
                file_size=one.record.bytes,
                width=one.record.width,
                height=one.record.height,
            )
            for one in made
        ],
        timings=Timings(inference=max(one.record.prior_s + one.record.decoder_s for one in made)),
        seed=first.seed,
        has_nsfw_concepts=[one.record.is_flagged for one in made],
        prompt=first.prompt,
    )


async def result(services: Services, job: Job, base: str) -> JSONResponse:
    """Returns the answer that a synchronous request would have got."""
    if not job.has_ended:
        return JSONResponse({"detail": "Request is still in progress"}, 400)
    if job.state == "succeeded":
        where = None if job.answer["sync_mode"] else base
        made = await services.delivery.kept(job.images, job.encoding.format, where)
        return JSONResponse(output(made).model_dump())
    error = _error(job)
    telemetry.note_error(error.code, status_of(error))
    return error_response(error)


def _error(job: Job) -> RequestError:
    """Returns why a job has no images."""
    return job.error.as_error() if job.error else Cancelled("The request was cancelled.")


def facts(job: Job, base: str) -> dict[str, Any]:
    """Returns the fields that all answers about a job have: its id, its URLs and its place in the queue."""
    url = f"{base}/queue/fal-ai/{job.answer['app']}/requests/{job.id}"
    return {
        "request_id": job.id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "queue_position": job.position,
    }


def status(job: Job, base: str, logs: Sequence[LogLine]) -> Status:
    """Returns a job's status, with these lines of its log."""
    shown = Status(status=STATUSES[job.state], **facts(job, base))
    if job.state == "queued":
        return shown
    shown.logs = [
        Log(timestamp=datetime.fromtimestamp(line.at, UTC).isoformat(), message=line.message) for line in logs
    ]
    if not job.has_ended:
        return shown
    shown.metrics = Metrics(inference_time=(job.ended_at or 0) - (job.started_at or job.ended_at or 0))
    if job.state != "succeeded":
        error = _error(job).for_api(NAMES)
        shown.error, shown.error_type = error.message, type_of(error)
    return shown


def compose(services: Services) -> Compose:
    """Returns the function that composes webhook messages: https://docs.fal.ai/model-endpoints/webhooks."""

    async def message(job: Job, timestamp: int, sign: Sign) -> Message:
        answer = await result(services, job, job.answer["base_url"])
        failed = job.state != "succeeded"
        payload = json.dumps(
            {
                "request_id": job.id,
                "gateway_request_id": job.id,
                "status": "ERROR" if failed else "OK",
                "error": f"Invalid status code: {answer.status_code}" if failed else None,
                "payload": json.loads(bytes(answer.body)),
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

    return message
