"""Errors in fal's words: https://docs.fal.ai/errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from serve_app.dialects import fal_and_pixazo
from serve_app.dialects.bodies import document_errors
from serve_app.dialects.fal.schemas import FalError
from serve_app.errors import Busy, TimedOut, Unavailable
from serve_app.http.errors import headers_of, status_of

if TYPE_CHECKING:
    from starlette.types import Scope

    from serve_app.errors import RequestError

RETRIED = (408, 409, 429, 502, 503)
"""Statuses that the clients retry whatever the headers say. They also retry 504, unless one header is set."""
NAMES = fal_and_pixazo.NAMES | {"webhook_url": "fal_webhook"}
"""This API's names of parameters that have other names here."""
PLACES = dict.fromkeys(("fal_webhook", "logs", "expires", "signature"), "query")
"""Places of parameters that are not in the body."""
TYPES = {
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
"""fal's types of errors by our codes."""
TYPES_BY_STATUS = {400: "value_error", 500: "internal_error"}
"""fal's types of other errors by our statuses. An error that is in neither table has its code as type."""


def type_of(error: RequestError) -> str:
    """Returns fal's type of an error."""
    return TYPES.get(error.code) or TYPES_BY_STATUS.get(status_of(error), error.code)


def error_response(error: RequestError, _: Scope | None = None) -> JSONResponse:
    """Returns the answer to a request that fails."""
    error = error.for_api(NAMES)
    status, headers, kind = status_of(error), headers_of(error), type_of(error)
    if status == 400:
        status = 422
    elif isinstance(error, TimedOut) and not error.retryable:
        headers["X-Fal-Request-Timeout-Type"] = "user"  # the clients do not retry then
    elif not error.retryable and status in RETRIED:
        status = 500  # the clients do not retry it
    retryable = isinstance(error, Busy | Unavailable) and error.retryable
    headers |= {"X-Fal-Error-Type": kind, "X-Fal-Retryable": str(retryable).lower()}
    if status != 422:
        return JSONResponse({"detail": error.message, "error_type": kind}, status, headers)
    name = error.param or ""
    place = "header" if name.lower().startswith("x-") else PLACES.get(name, "body")
    loc = [
        place,
        *(int(part) if part.isascii() and part.isdigit() else part for part in name.split(".") if part),
    ]
    return JSONResponse({"detail": [{"loc": loc, "msg": error.message, "type": kind}]}, status, headers)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in this API's envelope for each status, for the OpenAPI document."""
    return document_errors(FalError, 401, *statuses)
