"""The gates of a model's stages: images of jobs enter only where they keep no request waiting for long.

Images of requests enter immediately, and Ray Serve queues them. Images of jobs wait at the gate. Only as many
enter as all replicas that the stage may have work on at the same time. So a request waits for one of them,
and not for a queue of them. While further replicas are still loading, it may wait for several.
"""

from __future__ import annotations

import asyncio
import heapq
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serve_app.generation.fleet import FleetLimits


class Turn(NamedTuple):
    """Place of a job's image in the order of those that wait, the smallest first.

    Attributes:
        priority: number of the job's priority.
        work: place among the images of this priority.
    """

    priority: float
    work: float


class Gate:
    """The gate of one stage.

    Args:
        stage: name of the stage.
        places: images that all replicas that the stage may have work on at the same time.
        places_for_jobs: how many of them images of jobs may have.
        fleet: shares the places for jobs with all ingress replicas; None for a replica alone.
    """

    def __init__(
        self, stage: str, places: int, places_for_jobs: int, fleet: FleetLimits | None = None
    ) -> None:
        self._stage = stage
        self._fleet = fleet
        self._places = places
        self._places_for_jobs = places_for_jobs
        self._people = 0
        self._jobs = 0
        self._waiting: list[tuple[Turn, int, asyncio.Future[None]]] = []
        self._numbers = count()

    @property
    def takes_jobs(self) -> bool:
        """Whether requests leave a place for images of jobs."""
        return self._places > self._people

    @asynccontextmanager
    async def enter(self, turn: Turn | None) -> AsyncIterator[None]:
        """Lets an image into the stage for the duration of the block.

        Args:
            turn: turn of a job's image; None for an image of a request, which does not wait.
        """
        if turn is None:
            self._people += 1
        else:
            await self._wait(turn)
        try:
            if turn is None or self._fleet is None:
                yield
            else:
                async with self._fleet.place(self._stage, self._places_for_jobs):
                    yield
        finally:
            if turn is None:
                self._people -= 1
            else:
                self._jobs -= 1
            self._let_in()

    async def _wait(self, turn: Turn) -> None:
        """Returns when a job's image has a place."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (turn, next(self._numbers), place))
        self._let_in()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it had its place already
                self._jobs -= 1
                self._let_in()
            raise

    def _let_in(self) -> None:
        """Gives the free places to the images of jobs that wait, in their order."""
        while self._waiting and self._jobs < min(self._places_for_jobs, self._places - self._people):
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():  # otherwise its job was stopped
                self._jobs += 1
                place.set_result(None)
