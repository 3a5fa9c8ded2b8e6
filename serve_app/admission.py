"""How much unfinished work an ingress replica takes on."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHT = 0.2
"""Of the newest unit in the mean of what recent ones took."""


class Admission:
    """Counts the units that are not finished, and refuses those beyond a bound.

    Args:
        max_pending: the bound, running units included.

    Attributes:
        pending: units that are not finished.
    """

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._unit_s = 10.0  # until one is finished
        self.pending = 0

    @contextmanager
    def permit(self, units: int) -> Iterator[None]:
        """Take on so many units for as long as the block runs.

        Raises:
            RequestError: 429, there are too many already; its `Retry-After` says when there may be room.
        """
        if self.pending + units > self._max_pending:
            # Little's law: a unit is finished every unit_s / pending seconds.
            wait_s = math.ceil(units * self._unit_s / max(self.pending, 1))
            raise RequestError(
                f"The server has {self.pending} images to make and takes at most {self._max_pending}; try "
                f"again in {wait_s} s.",
                code="busy",
                status=429,
                headers={"Retry-After": str(wait_s)},
            )
        self.pending += units
        began = time.monotonic()
        try:
            yield
            self._unit_s += WEIGHT * (time.monotonic() - began - self._unit_s)
        finally:
            self.pending -= units
