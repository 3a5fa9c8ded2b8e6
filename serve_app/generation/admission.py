"""Admission: bounds on the unfinished work of an ingress replica, in total and for each API key."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from serve_app.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.config import Limits

WEIGHT = 0.2
"""Weight of the newest sample in the moving average of unit durations."""


class Admission:
    """Counts unfinished units and requested work; rejects what exceeds a bound.

    Attributes:
        pending: number of unfinished units.
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
        """Accepts units for the duration of the block.

        Args:
            units: number of units.
            key_id: id of the API key of the request.

        Raises:
            Busy: there are too many already; `retry_after_s` estimates when there will be room.
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

    def _refusal(self, who: str, pending: int, limit: int, units: int) -> Busy:
        # Little's law: a unit is finished every unit_s / pending seconds.
        wait_s = math.ceil(units * self._unit_s / max(pending, 1))
        return Busy(
            f"{who} {pending} images to make and may have {limit}; try again in {wait_s} s.",
            retry_after_s=wait_s,
        )

    async def charge(self, megapixel_steps: float, key_id: str) -> None:
        """Counts work that is about to begin.

        Raises:
            Busy: the key's work of this minute is used up; `retry_after_s` says when the next one begins.
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
            raise Busy(
                f"This request takes {cost} megapixel-steps (megapixels × denoising steps × images), and of "
                f"{self._rate} a minute your key has {stats.remaining} left; try again in {wait_s} s.",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
