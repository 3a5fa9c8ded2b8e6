"""Errors that a client is told about. How they are put into words of an API is the dialect's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_RETRY = {"x-should-retry": "false"}
"""Tells the OpenAI clients that the same request would fail again: they retry a 5xx by themselves."""


class RequestError(Exception):
    """The request cannot be served, and a client can do something about it, if only try again.

    Attributes:
        status: HTTP status: 400-499, or 500-504 with advice.
        message: what is wrong and what to do, for a person to read.
        param: the parameter at fault, as the client calls it.
        code: short and stable, for a program to read.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.headers = headers or {}


class ReplicaDied(Exception):  # noqa: N818 - a fault of the server, which the client need not know
    """A stage's replica has died with a unit; the unit can be made again, to the same bytes."""


class InvalidParameter(Exception):  # noqa: N818 - the client's error, not ours
    """A parameter of a `Generation` cannot be honoured. Dialects say it in their own words.

    Attributes:
        param: its name as a field of `Generation`, or `size`.
        problem: goes on from the parameter's name: "must be 1 to 10, not 11".
        code: short and stable, for a program to read.
    """

    def __init__(self, param: str, problem: str, *, code: str = "invalid_value") -> None:
        super().__init__(f"{param} {problem}")
        self.param = param
        self.problem = problem
        self.code = code


def in_words(error: RequestError | InvalidParameter, names: Mapping[str, str]) -> RequestError:
    """The error as an API tells it.

    Args:
        error: any.
        names: what the API calls a parameter, where that is not its name here.
    """
    if isinstance(error, RequestError):
        return error
    param = names.get(error.param, error.param)
    return RequestError(f"{param} {error.problem}.", param=param, code=error.code)


def server_error() -> RequestError:
    """A fault of the server, which is not the client's to know."""
    return RequestError("The server failed to answer; its log says why.", code="server_error", status=500)


def stopping() -> RequestError:
    """The server takes on nothing more."""
    return RequestError(
        "The server is stopping; try again in a moment.",
        code="stopping",
        status=503,
        headers={"Retry-After": "10"},
    )


def too_slow(limit_s: float) -> RequestError:
    """The body takes longer than `limit_s` seconds to come in."""
    return RequestError(
        f"The request body has not come in within {limit_s:g} s.",
        code="request_timeout",
        status=408,
        headers={"Connection": "close"},
    )


def too_much_at_once() -> RequestError:
    """The bodies of all requests together take too much memory."""
    return RequestError(
        "The server holds too many large requests; try again in a moment.",
        code="busy",
        status=429,
        headers={"Retry-After": "5"},
    )


def image_too_large(limit: int) -> RequestError:
    """A source image's file is larger than `limit` bytes."""
    return RequestError(
        f"The image is larger than the {limit} bytes allowed.",
        param="image",
        code="request_too_large",
        status=413,
    )


def too_large(limit: int) -> RequestError:
    """The body is larger than `limit` bytes."""
    return RequestError(
        f"The request body is larger than the {limit} bytes allowed.", code="request_too_large", status=413
    )
