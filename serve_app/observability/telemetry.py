"""A log line for every HTTP request; a span and a count too, unless it is a probe or loads a page.

Serve writes the line as JSON to its files and, without the fields, to the terminal. No line holds a prompt,
an image, a key or a path. It has the id of the key, and the route of the path.
"""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from deployments.observability import tracing
from serve_app.generation.request import MAX_ID_CHARS
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve_app.generation.events import GeneratedImage
    from serve_app.generation.request import ResolvedRequest
    from serve_app.jobs.records import StoredError
    from serve_app.jobs.tables import Job
    from serve_app.observability.recent import Recent

logger = logging.getLogger("ray.serve")

DESCRIPTION = ("model", "size", "n", "steps")
"""Facts of a request that the log may hold."""
PROBES = ("/health", "/version", "/livez", "/readyz", "/v1/internal/status", "/v1/internal/operator")
"""Routes that are polled every few seconds. Their lines have level DEBUG."""
PAGES = re.compile(r"(/|/operator|/playground/.*|/docs|/docs/.*)?", re.DOTALL)
"""Paths of the pages for browsers, their files and the redirect to the playground.

Their lines have level DEBUG, except for errors.
"""

_facts: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)
"""Facts for the line of the current HTTP request; None outside of one."""


def note(**facts: Any) -> None:
    """Adds facts to the line of the current HTTP request, if there is one."""
    if (current := _facts.get()) is not None:
        current.update(facts)


def note_for_client(text: str) -> None:
    """Adds a sentence to the line and to the answer's header `X-Image-Notes`, unless it has begun."""
    if (current := _facts.get()) is not None:
        current.setdefault("notes", []).append(text)


def note_request(request: ResolvedRequest) -> None:
    """Adds the description of a request to the line."""
    note(**{name: getattr(request, name) for name in DESCRIPTION}, sources=len(request.pixels))


def note_job(job: Job) -> None:
    """Adds the description of a submitted job to the line."""
    note(**_describe(job))


def note_images(made: list[GeneratedImage]) -> None:
    """Adds the seconds of each part of the work to the line: of several images, the longest ones."""
    facts = [image.facts for image in made]
    note(
        **{
            name: round(max(getattr(one, name) for one in facts), 3)
            for name in ("waiting_s", "prior_s", "decoder_s")
        }
    )
    for name in ("expansion_s", "safety_s"):
        if seconds := max(getattr(one, name) for one in facts):
            note(**{name: round(seconds, 3)})
    if problem := facts[0].not_expanded:
        note(not_expanded=problem)


def note_error(code: str, status: int) -> None:
    """Adds an error to the line.

    Args:
        code: its code.
        status: its HTTP status. A stream that breaks has another one: it has begun with a 200.
    """
    note(error=code, error_status=status)


def log_job_end(job: Job, outcome: str, seconds: float, failure: StoredError | None) -> None:
    """Writes the line of a job that has ended, or that another server runs from now on.

    Args:
        job: the job.
        outcome: its state, or that it was handed on.
        seconds: seconds that it took here.
        failure: why it failed.
    """
    facts = _describe(job) | {
        "event": "job",
        "api": job.api,
        "outcome": outcome,
        "error": failure.code if failure else None,
        "seconds": round(seconds, 3),
        "attempt": job.attempts,
        "key_id": job.key_id,
    }
    level = logging.ERROR if failure and failure.is_fault else logging.INFO
    logger.log(level, "job %s %s in %.3f s", job.id, outcome, seconds, extra=facts | _trace_id())


def _describe(job: Job) -> dict[str, Any]:
    facts = {name: getattr(job.request, name) for name in DESCRIPTION}
    return facts | {"job": job.id, "sources": len(job.sources)}


def _outcome(status: int, facts: Mapping[str, Any]) -> str:
    """Returns the outcome of a request that was answered, for the metrics."""
    if status < 400:
        status = facts.get("error_status", status)
    if status == HTTPStatus.TOO_MANY_REQUESTS or facts.get("error") == "stopping":
        return "rejected"
    if status >= 500:
        return "failed"
    return "refused" if status >= 400 else "succeeded"


def _header(scope: Scope, name: bytes) -> str:
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode("latin-1")


def _request_id(scope: Scope) -> str:
    return _header(scope, b"x-request-id")[:MAX_ID_CHARS]


def _trace_id() -> dict[str, str]:
    """Returns the field that links a line to its trace, if there is one."""
    traceparent = tracing.traceparent()
    return {"trace_id": traceparent.split("-")[1]} if traceparent else {}


LEVELS = {"failed": logging.ERROR, "rejected": logging.WARNING}
"""Levels of the outcomes that an operator should see; all others have INFO."""


class Requests:
    """Middleware that logs, traces and counts the requests.

    Args:
        app: the application behind it.
        api_of: returns the name of a path's dialect.
        disconnects: errors that the application raises because its client has disconnected.
        recent: keeps errors and work for the operator.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_of: Callable[[Scope], str],
        disconnects: tuple[type[Exception], ...],
        recent: Recent,
    ) -> None:
        self._app = app
        self._api_of = api_of
        self._disconnects = disconnects
        self._recent = recent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and reports how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_page = PAGES.fullmatch(path) is not None
        if is_page or path in PROBES:
            await self._answer(scope, receive, send, is_page=is_page)
        else:
            with tracing.span(
                scope["method"],
                kind="server",
                parent=_header(scope, b"traceparent"),
                request_id=_request_id(scope),
            ):
                await self._answer(scope, receive, send, is_page=False)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, *, is_page: bool) -> None:
        began = time.monotonic()
        facts: dict[str, Any] = {}
        token = _facts.set(facts)
        status, is_whole, has_left = 0, False, False

        async def received() -> Message:
            nonlocal has_left
            message = await receive()
            has_left |= message["type"] == "http.disconnect"
            return message

        async def noted(message: Message) -> None:
            nonlocal status, is_whole, has_left
            if message["type"] == "http.response.start":
                status = message["status"]
                if "notes" in facts:
                    notes = " ".join(facts["notes"]).encode("latin-1")
                    message["headers"] = [*message["headers"], (b"x-image-notes", notes)]
            try:
                await send(message)
            except self._disconnects:
                has_left = True
                raise
            # After a disconnect, some servers take all messages and send none.
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            is_whole |= is_last and not has_left

        try:
            await self._app(scope, received, noted)
        except Exception as error:
            if not (has_left and isinstance(error, self._disconnects)):
                status, is_whole = 500, True
                facts.setdefault("error", "server_error")
                raise
        finally:
            _facts.reset(token)
            outcome = _outcome(status, facts) if is_whole else "cancelled"
            is_quiet = is_page and status < 400
            self._report(scope, facts, status, outcome, time.monotonic() - began, is_quiet=is_quiet)

    def _report(
        self,
        scope: Scope,
        facts: dict[str, Any],
        status: int,
        outcome: str,
        seconds: float,
        *,
        is_quiet: bool,
    ) -> None:
        """Counts a request that has ended, writes its line and completes its span."""
        method, route = scope["method"], getattr(scope.get("route"), "path", "no route")
        api = self._api_of(scope)
        error_status = facts.pop("error_status", status)
        state = scope.get("state", {})
        facts |= {
            "event": "request",
            "api": api,
            "method": method,
            "route": route,
            "status": status,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "key_id": state.get("key_id", ""),
        }
        level = LEVELS.get(outcome, logging.INFO)
        if is_quiet or (status < 400 and route in PROBES):
            level = logging.DEBUG
        elif route not in PROBES:
            model = facts.get("model", "")
            metrics.REQUESTS.add(api=api, route=route, model=model, outcome=outcome)
            if "steps" in facts and "job" not in facts:  # it was accepted, and waited for its images
                metrics.REQUEST_SECONDS.observe(seconds, api=api, outcome=outcome)
                if outcome == "succeeded":
                    self._recent.note_work(facts)
            if outcome != "cancelled" and (code := facts.get("error")):
                metrics.ERRORS.add(code=code)
                if facts["key_id"] or state.get("is_operator") or error_status >= 500:
                    self._recent.note_error(facts, _request_id(scope), error_status)
        answer = status or "unanswered"
        extra = facts | _trace_id()
        logger.log(level, "%s %s %s in %.3f s", method, route, answer, seconds, extra=extra)
        tracing.note(
            f"{method} {route}",
            error=facts.get("error", "server_error") if outcome == "failed" else "",
            **{"http.request.method": method, "http.route": route, "http.response.status_code": status},
            **{name: facts[name] for name in ("api", "outcome", "model", "job") if name in facts},
        )
