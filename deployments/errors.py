"""What can go wrong in the model plane, in its own words. Status codes are the API plane's business."""

from __future__ import annotations

import logging
import re
import traceback
from functools import partial
from typing import Any

from deployments.observability.log import FAULT

logger = logging.getLogger("ray.serve")


def release(error: BaseException | None, what: str = "a unit failed", **facts: Any) -> None:
    """Log an error and let go of its frames, whose variables may hold gigabytes of the device.

    Whoever waits for the result keeps the error, and in a cycle, so that only the garbage collector would
    find it.

    Args:
        error: what went wrong; all who wait for it get it afterwards.
        what: the error is about.
        facts: more fields of the line.
    """
    if not isinstance(error, Cancelled):
        trace = "".join(traceback.format_exception(error))
        logger.error("%s: %s", what, trace, extra=FAULT | facts)
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


FOLDERS = re.compile(r"(?<![\w:/])/(?:[^\s/'\":]+/)+")
"""All of an absolute path but its last part; a URL's is none."""


class ModelError(Exception):
    """Base of the errors that the model plane raises on purpose."""


class CheckpointError(ModelError):
    """A checkpoint, or a named component of it, is missing or does not fit."""


class LoadingFailed(ModelError):  # noqa: N818 - what engineers call it
    """An engine could not be loaded.

    Attributes:
        reason: for the person who can mend it; of paths the last part only, since strangers read it too.
    """

    def __init__(self, reason: str) -> None:
        self.reason = FOLDERS.sub("…/", reason)
        super().__init__(self.reason)


class UnsupportedOption(ModelError):  # noqa: N818 - the configuration's error, not the model's
    """This machine, or a version of something on it, cannot do what the configuration asks for."""


class OtherWeights(ModelError):  # noqa: N818 - nobody's error
    """A prior was made by another model than the decoder's: an update has come to one of the stages alone."""


class EngineFault(ModelError):  # noqa: N818 - what engineers call it
    """An engine met a fault that it cannot go on from; its replica is to be replaced."""


class OutOfMemoryError(ModelError):
    """The device has too little memory for what was asked."""


class NotANumber(ModelError):  # noqa: N818 - likewise
    """The model's arithmetic ended in values that are no numbers; the unit is lost, the engine goes on."""


class Cancelled(ModelError):  # noqa: N818 - a request that was called off is not a fault
    """The caller has gone; the work was stopped."""


class RequestTooLong(ModelError):  # noqa: N818 - the request's fault, not the model's
    """A request has more tokens than the model's rows hold.

    Attributes:
        tokens: how many it has.
        limit: how many there may be.
        param: the text that is too long.
        alone: whether nothing else counts; if not, source images and the image do too.
    """

    def __init__(self, tokens: int, limit: int, *, param: str = "prompt", alone: bool = False) -> None:
        super().__init__(tokens, limit)
        self.tokens = tokens
        self.limit = limit
        self.param = param
        self.alone = alone

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which would leave out what is given by name."""
        return partial(RequestTooLong, param=self.param, alone=self.alone), (self.tokens, self.limit)

    def __str__(self) -> str:
        others = "" if self.alone else ", source images and image"
        return f"{self.param}{others} make {self.tokens} tokens; at most {self.limit} fit"
