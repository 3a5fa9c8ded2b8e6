"""Errors that a client is told about. How they are put into words of an API is the dialect's business."""

from __future__ import annotations


class RequestError(Exception):
    """The request cannot be served, and a client can do something about it.

    Attributes:
        status: HTTP status, 400-499.
        message: what is wrong and what to do, for a person to read.
        param: the request's parameter at fault, as `Generation` names it, or as the client wrote it.
        code: short and stable, for a program to read.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def too_large(limit: int) -> RequestError:
    """The body is larger than `limit` bytes."""
    return RequestError(
        f"The request body is larger than the {limit} bytes allowed.", code="request_too_large", status=413
    )
