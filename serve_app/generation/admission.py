"""Admission: bounds on the unfinished work of the server, in total and for each API key."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from serve_app.errors import Busy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serve_app.config import Limits
    from serve_app.generation.fleet import FleetLimits

WEIGHT = 0.2
"""Weight of the newest sample in the moving average of unit durations."""


class Exceeded(NamedTuple):
    """A bound that leaves no room.

    Attributes:
        who: subject and verb of the message, such as "Your key has".
        pending: unfinished units that count towards it.
        bound: how many there may be.
    """

    who: str
    pending: int
    bound: int


class Bounds(NamedTuple):
    """Bounds on unfinished units.

    Attributes:
        total: how many there may be of all keys.
        of_key: how many there may be of one key; None for no bound.
    """

    total: int
    of_key: int | None

    def check(self, units: int, pending: int, of_key: int) -> Exceeded | None:
        """Returns the bound that more units would exceed; None if there is room.

        Args:
            units: number of units to add.
            pending: unfinished units of all keys.
            of_key: unfinished units of the key.
        """
        if pending + units > self.total:
            return Exceeded("The server has", pending, self.total)
        if self.of_key is not None and of_key + units > self.of_key:
            return Exceeded("Your key has", of_key, self.of_key)
        return None


class WorkRates:
    """Counts the work of each key in windows of a minute. A window begins with a request."""

    def __init__(self) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def charge(self, cost: int, key_id: str, rate: int) -> tuple[int, float] | None:
        """Counts work if the key has as much left; otherwise returns what is left, and when it is renewed.

        Args:
            cost: megapixel-steps.
            key_id: id of the key.
            rate: most megapixel-steps of the key a minute.

        Returns:
            None, or the megapixel-steps that are left and the seconds until the next window.
        """
        minute = RateLimitItemPerMinute(rate)
        # `hit` alone would count what it refuses.
        if await self._limiter.test(minute, key_id, cost=cost) and await self._limiter.hit(
            minute, key_id, cost=cost
        ):
            return None
        stats = await self._limiter.get_window_stats(minute, key_id)
        return stats.remaining, stats.reset_time - time.time()


class Admission:
    """Counts unfinished units and requested work; rejects what exceeds a bound.

    Args:
        limits: the bounds.
        fleet: the limits of all ingress replicas together; None for a replica alone.

    Attributes:
        pending: number of unfinished units of this replica.
    """

    def __init__(self, limits: Limits, fleet: FleetLimits | None = None) -> None:
        self._bounds = Bounds(limits.max_pending, limits.max_pending_per_key)
        self._rate = limits.megapixel_steps_per_minute
        self._fleet = fleet
        self._rates = fleet or WorkRates()
        self._unit_s = 10.0  # until one is finished
        self._of_key: Counter[str] = Counter()
        self.pending = 0

    @asynccontextmanager
    async def permit(self, units: int, key_id: str) -> AsyncIterator[None]:
        """Accepts units for the duration of the block.

        Args:
            units: number of units.
            key_id: id of the API key of the request.

        Raises:
            Busy: there are too many already; `retry_after_s` estimates when there will be room.
        """
        self._reject(self._bounds.check(units, self.pending, self._of_key[key_id]), units)
        self.pending += units
        self._of_key[key_id] += units
        try:
            async with AsyncExitStack() as stack:
                if self._fleet:
                    held = self._fleet.hold(units, key_id, self._bounds)
                    self._reject(await stack.enter_async_context(held), units)
                began = time.monotonic()
                yield
                self._unit_s += WEIGHT * (time.monotonic() - began - self._unit_s)
        finally:
            self.pending -= units
            self._of_key[key_id] -= units

    def _reject(self, exceeded: Exceeded | None, units: int) -> None:
        if exceeded is None:
            return
        # Little's law: a unit is finished every unit_s / pending seconds.
        wait_s = math.ceil(units * self._unit_s / max(exceeded.pending, 1))
        who, pending, bound = exceeded
        raise Busy(
            f"{who} {pending} images to make and may have {bound}; try again in {wait_s} s.",
            retry_after_s=wait_s,
        )

    async def charge(self, megapixel_steps: float, key_id: str) -> None:
        """Counts work that is about to begin.

        Raises:
            Busy: the key's work of this minute is used up; `retry_after_s` says when the next one begins.
        """
        if self._rate is None:
            return
        cost = math.ceil(megapixel_steps)
        if used_up := await self._rates.charge(cost, key_id, self._rate):
            remaining, renewed_in_s = used_up
            wait_s = max(1, math.ceil(renewed_in_s))
            raise Busy(
                f"This request takes {cost} megapixel-steps (megapixels × denoising steps × images), and of "
                f"{self._rate} a minute your key has {remaining} left; try again in {wait_s} s.",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
