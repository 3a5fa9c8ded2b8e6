"""Limits that hold over all ingress replicas, as generation sees them. A replica alone has its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from serve_app.generation.admission import Bounds, Exceeded


class FleetLimits(Protocol):
    """Counts work over all ingress replicas; see `serve_app.cluster.fleet.FleetClient`."""

    def hold(self, units: int, key_id: str, bounds: Bounds) -> AbstractAsyncContextManager[Exceeded | None]:
        """Holds units for the duration of the block, unless it yields the bound that leaves no room."""
        ...

    async def charge(self, cost: int, key_id: str, rate: int) -> tuple[int, float] | None:
        """Counts work like `WorkRates.charge`."""
        ...

    def place(self, stage: str, places: int) -> AbstractAsyncContextManager[None]:
        """Waits for one of a stage's places for images of jobs; holds it for the duration of the block."""
        ...
