"""Errors of the model plane. `serve_app.generation.unit` words them for clients.

Ray raises an error of another process as an instance of its own class.
"""

from __future__ import annotations

import logging
import re
import traceback
from functools import partial
from typing import Any

from deployments.observability.log import FAULT

logger = logging.getLogger("ray.serve")


def release(error: BaseException | None, what: str = "a unit failed", **facts: Any) -> None:
    """Logs an error and drops its tracebacks, whose frames may hold gigabytes of the device's memory.

    The future of the result keeps the error, in a reference cycle. Without this function the frames would
    live until the garbage collector runs. A `Cancelled` error is not logged.

    Args:
        error: the error. Its callers get it afterwards.
        what: beginning of the log line.
        facts: more fields of the log line.
    """
    if not isinstance(error, Cancelled):
        trace = "".join(traceback.format_exception(error))
        logger.error("%s: %s", what, trace, extra=FAULT | facts)
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


FOLDERS = re.compile(r"(?<![\w:/])/(?:[^\s/'\":]+/)+")
"""Pattern of all folders of an absolute path. It does not match the path of a URL."""


class ModelError(Exception):
    """Base of the errors that the model plane raises on purpose."""


class CheckpointError(ModelError):
    """A checkpoint or one of its components is missing or unusable."""


class LoadingFailed(ModelError):
    """An engine could not be loaded.

    Attributes:
        reason: cause, for the operator. Clients read it too, so paths are cut to their last part.
    """

    def __init__(self, reason: str) -> None:
        self.reason = FOLDERS.sub("…/", reason)
        super().__init__(self.reason)


class UnsupportedOption(ModelError):
    """The configuration has an option that this machine, or an installed version, does not support."""


class OtherWeights(ModelError):
    """A prior was made by another model than the decoder's. An update has reached only one of the stages."""


class EngineFault(ModelError):
    """An engine had a fault that it cannot recover from.

    Its stage ends the process, which Serve replaces.
    """


class OutOfMemoryError(ModelError):
    """The device has too little memory for a request."""


class NotANumber(ModelError):
    """The model's arithmetic produced NaN or infinity. The unit is lost; the engine continues."""


class Cancelled(ModelError):
    """The caller is gone, and its work was stopped."""


class RequestTooLong(ModelError):
    """A request has more tokens than the model's `max_sequence_length`.

    Attributes:
        tokens: number of tokens in the request.
        limit: largest allowed number.
        param: name of the text that is too long.
        alone: whether only that text counts. If not, source images and the image count too.
    """

    def __init__(self, tokens: int, limit: int, *, param: str = "prompt", alone: bool = False) -> None:
        super().__init__(tokens, limit)
        self.tokens = tokens
        self.limit = limit
        self.param = param
        self.alone = alone

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to restore the error, for pickle, which would omit the keyword arguments."""
        return partial(RequestTooLong, param=self.param, alone=self.alone), (self.tokens, self.limit)

    def __str__(self) -> str:
        others = "" if self.alone else ", source images and image"
        return f"{self.param}{others} take {self.tokens} tokens; at most {self.limit} fit; shorten the prompt"
