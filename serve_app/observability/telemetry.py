"""A line of the log, a span and a count for every request, with all that explains it but what was asked for.

Serve writes the line as JSON to its own files and, without the fields, to the terminal. There is never a
prompt, an image, a key or a path in any of them: of a path its route, of a key its id.
"""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from deployments.observability import tracing
from serve_app.generation.request import MAX_ID_CHARS
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve_app.generation.request import GeneratedImage, Resolved
    from serve_app.jobs.store import Job

logger = logging.getLogger("ray.serve")

DESCRIPTION = ("model", "size", "n", "steps")
"""What may be told of a generation."""
PROBES = ("/health", "/livez", "/readyz", "/v1/internal/status")
"""Asked every few seconds: logged for who wants to see all."""


def note_generation(request: Request, generation: Resolved) -> None:
    """Have the request's line say what is made, and by which model."""
    request.state.log |= {name: getattr(generation, name) for name in DESCRIPTION}
    request.state.log["sources"] = len(generation.sources)


def note_job(request: Request, job: Job) -> None:
    """Have it say likewise what is to be made, by a job."""
    request.state.log |= _describe(job)


def note_images(request: Request, made: list[GeneratedImage]) -> None:
    """Have it say, too, how long each part took: of several images, the longest times."""
    log = request.state.log
    for name in ("waiting_s", "prior_s", "decoder_s"):
        log[name] = round(max(getattr(image, name) for image in made), 3)
    for name in ("expansion_s", "safety_s"):
        if seconds := max(getattr(image, name) for image in made):
            log[name] = round(seconds, 3)
    if problem := made[0].not_expanded:
        log["not_expanded"] = problem


def note_error(request: Request, code: str) -> None:
    """Have it say what went wrong, which a stream's status does not."""
    request.state.log["error"] = code


def note_job_end(job: Job, outcome: str, seconds: float, failure: Mapping[str, Any] | None) -> None:
    """A job has ended, or is no longer run here: write its line, and say so in its span.

    Args:
        job: which.
        outcome: its state, or that it was handed on.
        seconds: that it took here.
        failure: why it failed, see `serve_app.generation.delivery.failure`.
    """
    error = failure["code"] if failure else ""
    facts = _describe(job) | {
        "event": "job",
        "api": job.api,
        "outcome": outcome,
        "error": error or None,
        "seconds": round(seconds, 3),
        "attempt": job.attempts,
        "key_id": job.key_id,
    }
    level = logging.ERROR if failure and failure["status"] >= 500 else logging.INFO
    logger.log(level, "job %s %s in %.3f s", job.id, outcome, seconds, extra=facts | _trace_id())
    tracing.note(error=error, model=job.model, outcome=outcome)


def _describe(job: Job) -> dict[str, Any]:
    facts = {name: job.request[name] for name in DESCRIPTION}
    return facts | {"job": job.id, "sources": len(job.sources)}


def _outcome(status: int, facts: Mapping[str, Any]) -> str:
    """Of a request, as the metrics have it."""
    if not status:
        return "cancelled"
    if status == HTTPStatus.TOO_MANY_REQUESTS or facts.get("error") == "stopping":
        return "rejected"
    if status >= 500 or (status < 400 and "error" in facts):  # a stream that broke
        return "failed"
    return "refused" if status >= 400 else "succeeded"


def _trace_id() -> dict[str, str]:
    """By which a line leads to its trace, if there is one."""
    traceparent = tracing.traceparent()
    return {"trace_id": traceparent.split("-")[1]} if traceparent else {}


LEVELS = {"failed": logging.ERROR, "rejected": logging.WARNING}
"""Of outcomes that somebody should look at; all others are INFO."""


class Requests:
    """Writes the lines, and traces and counts the requests.

    Args:
        app: what answers.
        api_of: the API that a path belongs to.
    """

    def __init__(self, app: ASGIApp, api_of: Callable[[Scope], str]) -> None:
        self._app = app
        self._api_of = api_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tell how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].removeprefix(scope.get("root_path", "")) in PROBES:
            await self._answer(scope, receive, send)
        else:
            headers = dict(scope["headers"])
            with tracing.span(
                scope["method"],
                kind="server",
                parent=headers.get(b"traceparent", b"").decode("latin-1"),
                request_id=headers.get(b"x-request-id", b"").decode("latin-1")[:MAX_ID_CHARS],
            ):
                await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = facts
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            self._tell(scope, facts, status, time.monotonic() - began)

    def _tell(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        """Count a request that has ended, and tell the log and its span."""
        method, route = scope["method"], getattr(scope.get("route"), "path", "no route")
        api, outcome = self._api_of(scope), _outcome(status, facts)
        facts |= {
            "event": "request",
            "api": api,
            "method": method,
            "route": route,
            "status": status,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "key_id": scope["state"].get("key_id", ""),
        }
        level = LEVELS.get(outcome, logging.INFO)
        if route not in PROBES:
            model = facts.get("model", "")
            metrics.REQUESTS.add(api=api, route=route, model=model, outcome=outcome)
            if model and "job" not in facts:
                metrics.REQUEST_SECONDS.observe(seconds, api=api, outcome=outcome)
            if code := facts.get("error"):
                metrics.ERRORS.add(code=code)
        elif status < 400:
            level = logging.DEBUG
        answer = status or "unanswered"
        extra = facts | _trace_id()
        logger.log(level, "%s %s %s in %.3f s", method, route, answer, seconds, extra=extra)
        tracing.note(
            f"{method} {route}",
            error=facts.get("error", "server_error") if outcome == "failed" else "",
            **{"http.request.method": method, "http.route": route, "http.response.status_code": status},
            **{name: facts[name] for name in ("api", "outcome", "model", "job") if name in facts},
        )
