"""How much unfinished work an ingress replica takes on, and how much of whom."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.config import Limits

WEIGHT = 0.2
"""Of the newest unit in the mean of what recent ones took."""


class Admission:
    """Counts the units that are not finished and the work that was asked for; refuses what is beyond a bound.

    Attributes:
        pending: units that are not finished.
    """

    def __init__(self, limits: Limits) -> None:
        self._max_pending = limits.max_pending
        self._max_pending_per_key = limits.max_pending_per_key
        self._rate = limits.megapixel_steps_per_minute
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._unit_s = 10.0  # until one is finished
        self._of_key: Counter[str] = Counter()
        self.pending = 0

    @contextmanager
    def permit(self, units: int, key_id: str) -> Iterator[None]:
        """Take on so many units for as long as the block runs.

        Args:
            units: how many.
            key_id: of the key with which they were asked for.

        Raises:
            RequestError: 429, there are too many already; its `Retry-After` says when there may be room.
        """
        mine = self._of_key[key_id]
        if self.pending + units > self._max_pending:
            raise self._refusal("The server has", self.pending, self._max_pending, units)
        if self._max_pending_per_key is not None and mine + units > self._max_pending_per_key:
            raise self._refusal("Your key has", mine, self._max_pending_per_key, units)
        self.pending += units
        self._of_key[key_id] += units
        began = time.monotonic()
        try:
            yield
            self._unit_s += WEIGHT * (time.monotonic() - began - self._unit_s)
        finally:
            self.pending -= units
            self._of_key[key_id] -= units

    def _refusal(self, who: str, pending: int, limit: int, units: int) -> RequestError:
        # Little's law: a unit is finished every unit_s / pending seconds.
        wait_s = math.ceil(units * self._unit_s / max(pending, 1))
        return RequestError(
            f"{who} {pending} images to make and may have {limit}; try again in {wait_s} s.",
            code="busy",
            status=429,
            headers={"Retry-After": str(wait_s)},
        )

    async def charge(self, megapixel_steps: float, key_id: str) -> None:
        """Count work that is about to begin.

        Raises:
            RequestError: 429, it is too much for one minute; its `Retry-After` says when it will not be.
        """
        if self._rate is None:
            return
        minute, cost = RateLimitItemPerMinute(self._rate), math.ceil(megapixel_steps)
        # `hit` alone would count what it refuses.
        if not (
            await self._limiter.test(minute, key_id, cost=cost)
            and await self._limiter.hit(minute, key_id, cost=cost)
        ):
            stats = await self._limiter.get_window_stats(minute, key_id)
            wait_s = max(1, math.ceil(stats.reset_time - time.time()))
            raise RequestError(
                f"This request takes {cost} megapixel-steps (megapixels × denoising steps × images), and of "
                f"{self._rate} a minute your key has {stats.remaining} left; try again in {wait_s} s.",
                code="rate_limit_exceeded",
                status=429,
                headers={"Retry-After": str(wait_s)},
            )
