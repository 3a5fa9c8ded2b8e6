"""Errors over HTTP: the status and the headers of each kind, and the errors that only HTTP knows."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from serve_app.errors import (
    Busy,
    Cancelled,
    Conflict,
    Failed,
    Full,
    Gone,
    Invalid,
    NotFound,
    Refused,
    RequestError,
    TimedOut,
    TooLarge,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIENT_CLOSED = 499
"""Nginx's status for a request that the client cancelled; HTTP defines none."""

STATUSES: dict[type[RequestError], int] = {
    Invalid: 400,
    Refused: 403,
    NotFound: 404,
    Conflict: 409,
    Gone: 410,
    TooLarge: 413,
    Busy: 429,
    Cancelled: CLIENT_CLOSED,
    Failed: 500,
    Unavailable: 503,
    TimedOut: 504,
    Full: 507,
}
"""The status of each kind. A subclass that is not listed has its base's."""
RETRIED_BY_CLIENTS = frozenset({408, 409, 429, *range(500, 600)})
"""Statuses that OpenAI's clients retry by themselves, unless a header says not to."""


class ProtocolError(RequestError):
    """An error that only HTTP knows.

    Attributes:
        status: HTTP status.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code or HTTPStatus(status).name.lower(), param=param, retryable=True)
        self.status = status
        self.headers = headers or {}


def status_of(error: RequestError) -> int:
    """Returns the HTTP status of an error."""
    if isinstance(error, ProtocolError):
        return error.status
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def headers_of(error: RequestError) -> dict[str, str]:
    """Returns the headers of an error's answer."""
    headers = dict(error.headers) if isinstance(error, ProtocolError) else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if not error.retryable and status_of(error) in RETRIED_BY_CLIENTS:
        headers["x-should-retry"] = "false"
    return headers


def too_large(limit: int) -> TooLarge:
    """Returns the error for a body of more than `limit` bytes."""
    return TooLarge(f"The request body is larger than the {limit} bytes allowed; send a smaller one.")


def compressed() -> ProtocolError:
    """Returns the error for a compressed body: https://www.rfc-editor.org/rfc/rfc9110#section-12.5.3."""
    return ProtocolError(
        "Send the body uncompressed, without Content-Encoding.",
        param="Content-Encoding",
        status=415,
        headers={"Accept-Encoding": "identity"},
    )


def too_slow(limit_s: float) -> ProtocolError:
    """Returns the error for a body that takes longer than `limit_s` seconds to arrive."""
    return ProtocolError(
        f"The request body did not arrive within {limit_s:g} s; send a smaller one, or URLs of images.",
        code="request_timeout",
        status=408,
        headers={"Connection": "close"},
    )


def too_many_bytes() -> Busy:
    """Returns the error for a body that does not fit beside those of the other requests."""
    return Busy("The server is receiving too many large requests; try again in a moment.", retry_after_s=5)
