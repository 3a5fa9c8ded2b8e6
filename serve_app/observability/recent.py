"""Errors and work of this ingress replica since its start, kept in memory for the operator."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ERRORS = 50
DAYS = 30
"""Days for which work is reported."""
DAY_S = 86_400


class RecentError(NamedTuple):
    """An error that a client got.

    Attributes:
        at: seconds since 1970.
        request_id: id of the request.
        key_id: id of its API key; empty without one.
        api: name of its API.
        code: code of the error.
        status: HTTP status of the error. A stream that breaks has begun with a 200.
    """

    at: float
    request_id: str
    key_id: str
    api: str
    code: str
    status: int


@dataclass
class Work:
    """Work for an API key within a day.

    Attributes:
        requests: number of requests, or of jobs.
        images: number of their images.
        megapixel_steps: megapixels of an image × denoising steps × images, in total.
    """

    requests: int = 0
    images: int = 0
    megapixel_steps: float = 0

    def add(self, images: int, megapixel_steps: float) -> None:
        """Adds a request."""
        self.requests += 1
        self.images += images
        self.megapixel_steps += megapixel_steps


WorkByDay = dict[tuple[str, str], Work]
"""Work by day and API key."""


def day_of(seconds: float) -> str:
    """Returns the day of a time in seconds since 1970, by UTC."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


class Recent:
    """The last errors, and the work of the last days.

    Attributes:
        errors: the last errors, the oldest first.
        work: work of requests that have succeeded, in the last days. Jobs are in the database.
    """

    def __init__(self) -> None:
        self.errors: deque[RecentError] = deque(maxlen=MAX_ERRORS)
        self.work: WorkByDay = {}

    def note_error(self, facts: Mapping[str, Any], request_id: str, status: int) -> None:
        """Notes the error of a request, whose line has these facts."""
        self.errors.append(
            RecentError(time.time(), request_id, facts["key_id"], facts["api"], facts["error"], status)
        )

    def note_work(self, facts: Mapping[str, Any]) -> None:
        """Notes the work of a request that has succeeded, whose line has these facts."""
        now = time.time()
        oldest = day_of(now - DAYS * DAY_S)
        self.work = {key: work for key, work in self.work.items() if key[0] > oldest}
        (width, height), steps, images = facts["size"], facts["steps"], facts["n"]
        work = self.work.setdefault((day_of(now), facts["key_id"]), Work())
        work.add(images, width * height * steps * images / 1e6)
