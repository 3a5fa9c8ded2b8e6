"""The kinds of errors that clients get. `serve_app.http.errors` maps them to status codes.

A dialect may map some of them to other codes: fal's API has 422 for 400, and Z.ai's has 400 for an unknown
model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class RequestError(Exception):
    """Base of all errors that a client gets. Raise one of the kinds below.

    Attributes:
        message: what is wrong, and what to do, for a person.
        param: the parameter at fault, as the client calls it. `for_api` gives it the API's name.
        code: short and stable, for a program.
        retryable: whether the same request may succeed later.
        retry_after_s: seconds to wait before the retry; None if unknown.
    """

    RETRYABLE: ClassVar[bool] = False
    CODE: ClassVar[str] = "invalid_value"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        retryable: bool | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.CODE
        self.param = param
        self.retryable = self.RETRYABLE if retryable is None else retryable
        self.retry_after_s = retry_after_s

    def for_api(self, names: Mapping[str, str]) -> RequestError:
        """Returns the error in the words of an API.

        Args:
            names: the API's name of each parameter that has another name here.
        """
        del names
        return self


class Invalid(RequestError):
    """The request cannot be honoured as it is."""


class InvalidParameter(Invalid):
    """A parameter of a `GenerationRequest` cannot be honoured.

    Attributes:
        problem: continues a sentence that begins with the parameter's name: "must be 1 to 10, not 11".
    """

    def __init__(self, param: str, problem: str, *, code: str = "") -> None:
        super().__init__(f"{param} {problem}.", code=code, param=param)
        self.problem = problem

    def for_api(self, names: Mapping[str, str]) -> RequestError:
        """Returns the error with the API's name of the parameter."""
        name = names.get(self.param or "", self.param or "")
        return Invalid(f"{name} {self.problem}.", code=self.code, param=name)


class TooLarge(Invalid):
    """A body, or an image in it, has too many bytes."""

    CODE = "request_too_large"

    def for_api(self, names: Mapping[str, str]) -> RequestError:
        """Returns the error with the API's name of the parameter."""
        param = self.param and names.get(self.param, self.param)
        return TooLarge(self.message, code=self.code, param=param)


class Refused(RequestError):
    """The client may not do that."""

    CODE = "forbidden"


class NotFound(RequestError):
    """The thing does not exist, or belongs to another API key."""

    CODE = "not_found"


class Gone(RequestError):
    """The thing existed and was deleted."""


class Conflict(RequestError):
    """The thing is in a state that does not allow the request."""


class Busy(RequestError):
    """A bound on work or memory is reached; there will be room again."""

    RETRYABLE = True
    CODE = "busy"


class Unavailable(RequestError):
    """Something that the request needs is away for now."""

    RETRYABLE = True
    CODE = "unavailable"


class Full(RequestError):
    """The file storage has no room."""

    CODE = "storage_full"


class Failed(RequestError):
    """The server could not do what it should have done. Its log says why."""

    CODE = "server_error"


class TimedOut(RequestError):
    """The request was stopped at its deadline."""

    CODE = "deadline_exceeded"


class Cancelled(RequestError):
    """The client cancelled the request."""

    CODE = "client_cancelled"


class ReplicaDied(Exception):
    """A replica of a stage or a helper has died with a unit, which can be made again with the same bytes.

    Clients never get this error. `unit` and `safety` in `serve_app.generation` ask another replica once.
    `prompt_expansion` leaves the prompt as it is.
    """


def server_error() -> Failed:
    """Returns the error for a fault whose details are not the client's business."""
    return Failed(
        "The server failed to answer; its log says why. Try again, or send the `x-request-id` of this answer "
        "to the operator.",
        retryable=True,
    )


def stopping() -> Unavailable:
    """Returns the error for requests that arrive while the server stops."""
    return Unavailable("The server is stopping; try again in a moment.", code="stopping", retry_after_s=10)


def image_too_large(limit: int) -> TooLarge:
    """Returns the error for a source image of more than `limit` bytes."""
    return TooLarge(
        f"The image is larger than the {limit} bytes allowed; send a smaller one.", param="sources"
    )
