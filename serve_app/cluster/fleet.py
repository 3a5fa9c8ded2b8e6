"""The ingress replicas of an application: their unfinished work in sum, and orders to stop it.

A Ray actor keeps it, so that limits hold over all replicas. An application with one replica has none.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import ray
import ray.actor
from ray.exceptions import RayError

from deployments.observability.log import FAULT
from serve_app.generation.admission import Bounds, Exceeded, WorkRates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator

    from serve_app.cluster.actors import ActorClient

logger = logging.getLogger("ray.serve")

NAMESPACE = "glm-image-fleet-1"
"""Ray namespace of the actor; see `ActorClient`."""
WAIT_S = 2.0
"""An image that waits for a place asks again after this time.

Nothing wakes it when the places of a dead replica expire.
"""
LEASE_S = 6.0
"""Seconds for which a replica's report is valid. Then the units of a replica that has died are free again."""
ORPHANED_S = 60.0
"""Seconds without a report after which the actor ends itself."""


class Held(NamedTuple):
    """Unfinished units of one request."""

    units: int
    key_id: str


@dataclass
class _Ingress:
    """The report of an ingress replica.

    Attributes:
        until: time until which the report is valid.
        held: its unfinished units, by the id of their request.
        running: number of its running requests, by model.
        places: names of the stages in which images of its jobs have a place, by the id of the image.
        to_abort: models whose requests it must stop, and has not been told of.
    """

    until: float
    held: dict[str, Held] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    to_abort: set[str] = field(default_factory=set)


class Fleet:
    """Counts the unfinished work of all ingress replicas. A Ray actor.

    Args:
        lease_s: seconds for which a replica's report is valid.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._ingresses: dict[str, _Ingress] = {}
        self._rates = WorkRates()
        self._left = asyncio.Event()
        self._reported_at = time.monotonic()

    def _alive(self) -> dict[str, _Ingress]:
        now = time.monotonic()
        self._ingresses = {name: one for name, one in self._ingresses.items() if one.until > now}
        return self._ingresses

    def _ingress(self, name: str) -> _Ingress:
        """Returns a replica's entry. Its call shows that it is alive."""
        self._reported_at = time.monotonic()
        until = self._reported_at + self._lease_s
        ingress = self._alive().setdefault(name, _Ingress(until))
        ingress.until = until
        return ingress

    async def report(
        self, ingress: str, held: dict[str, Held], running: dict[str, int], images: set[str]
    ) -> list[str]:
        """Replaces what is known of a replica; returns the models whose requests it must stop.

        Args:
            ingress: id of the replica.
            held: its unfinished units, by the id of their request.
            running: number of its running requests, by model.
            images: ids of the images of jobs that have a place, or wait for one.
        """
        mine = self._ingress(ingress)
        mine.held, mine.running = held, running
        mine.places = {image: stage for image, stage in mine.places.items() if image in images}
        self._left.set()
        orders, mine.to_abort = sorted(mine.to_abort), set()
        return orders

    async def hold(self, ingress: str, request: str, wanted: Held, bounds: Bounds) -> Exceeded | None:
        """Adds units to a replica's, unless they exceed a bound; returns the bound then."""
        mine = self._ingress(ingress)
        others = [held for one in self._alive().values() for id_, held in one.held.items() if id_ != request]
        pending = sum(held.units for held in others)
        of_key = sum(held.units for held in others if held.key_id == wanted.key_id)
        exceeded = bounds.check(wanted.units, pending, of_key)
        if exceeded is None:
            mine.held[request] = wanted
        return exceeded

    async def let_go(self, ingress: str, request: str) -> None:
        """Removes the units of a request that has ended."""
        self._ingress(ingress).held.pop(request, None)

    async def charge(self, cost: int, key_id: str, rate: int) -> tuple[int, float] | None:
        """Counts work; see `WorkRates.charge`."""
        return await self._rates.charge(cost, key_id, rate)

    async def enter(self, ingress: str, image: str, stage: str, places: int) -> bool:
        """Gives an image of a job a place in a stage; returns whether there was one within `WAIT_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                while self._taken(stage) >= places:
                    self._left.clear()
                    await self._left.wait()
            self._ingress(ingress).places[image] = stage
            return True
        return False

    def _taken(self, stage: str) -> int:
        return sum(one == stage for ingress in self._alive().values() for one in ingress.places.values())

    async def leave(self, ingress: str, image: str) -> None:
        """Takes the place of an image back."""
        self._ingress(ingress).places.pop(image, None)
        self._left.set()

    async def running(self, ingress: str, models: list[str]) -> int:
        """Returns the number of requests of these models that run in other replicas than this one."""
        others = (one for name, one in self._alive().items() if name != ingress)
        return sum(one.running.get(model, 0) for one in others for model in models)

    async def abort(self, ingress: str, models: list[str]) -> None:
        """Orders all other replicas than this one to stop the requests of these models.

        A replica without such requests gets no order: it would stop those that begin after the unload.
        """
        for name, one in self._alive().items():
            if name != ingress:
                one.to_abort |= {model for model in models if one.running.get(model)}

    async def watch(self) -> None:
        """Ends the actor when the application is gone."""
        while time.monotonic() - self._reported_at < ORPHANED_S:  # noqa: ASYNC110 - waits for silence
            await asyncio.sleep(self._lease_s)
        ray.actor.exit_actor()


class FleetClient:
    """An ingress replica's part of the fleet.

    While the actor cannot be reached, the replica's own bounds hold. The next report tells a new actor what
    the replica holds.

    Args:
        actor: client of the actor.
    """

    def __init__(self, actor: ActorClient) -> None:
        self._actor = actor
        self._ingress = uuid.uuid4().hex
        self._held: dict[str, Held] = {}
        self._images: set[str] = set()
        self._rates = WorkRates()

    @asynccontextmanager
    async def hold(self, units: int, key_id: str, bounds: Bounds) -> AsyncIterator[Exceeded | None]:
        """Holds units for the duration of the block, unless it yields the bound that leaves no room."""
        request = uuid.uuid4().hex
        # A report that is on its way must not remove what the actor adds.
        self._held[request] = Held(units, key_id)
        try:
            exceeded: Exceeded | None = None
            with _logged():
                exceeded = await self._actor.ask("hold", self._ingress, request, self._held[request], bounds)
            yield exceeded
        finally:
            del self._held[request]
            self._actor.tell("let_go", self._ingress, request)

    async def charge(self, cost: int, key_id: str, rate: int) -> tuple[int, float] | None:
        """Counts work; see `WorkRates.charge`."""
        with _logged():
            used_up: tuple[int, float] | None = await self._actor.ask("charge", cost, key_id, rate)
            return used_up
        return await self._rates.charge(cost, key_id, rate)

    @asynccontextmanager
    async def place(self, stage: str, places: int) -> AsyncIterator[None]:
        """Waits for one of a stage's places for images of jobs; holds it for the duration of the block."""
        image = uuid.uuid4().hex
        self._images.add(image)
        try:
            has_place = False
            while not has_place:
                has_place = True  # without the actor, the replica's own gate suffices
                with _logged():
                    has_place = await self._actor.ask("enter", self._ingress, image, stage, places)
            yield
        finally:
            self._images.remove(image)
            self._actor.tell("leave", self._ingress, image)

    async def report(self, running: dict[str, int]) -> list[str]:
        """Reports the running requests by model; returns the models whose requests must stop.

        Raises:
            RayError: the actor has died. The next call goes to a new and empty one.
            TimeoutError: the actor does not answer.
        """
        orders: list[str] = await self._actor.ask("report", self._ingress, self._held, running, self._images)
        return orders

    async def running(self, models: Collection[str]) -> int:
        """Returns the number of requests of these models that run in other replicas.

        Raises:
            RayError: the actor has died. The next call goes to a new and empty one.
            TimeoutError: the actor does not answer.
        """
        count: int = await self._actor.ask("running", self._ingress, list(models))
        return count

    async def abort(self, models: Collection[str]) -> None:
        """Orders all other replicas to stop the requests of these models; see `running` for errors."""
        await self._actor.ask("abort", self._ingress, list(models))


@contextmanager
def _logged() -> Iterator[None]:
    """Logs that the actor cannot be reached, instead of raising it."""
    try:
        yield
    except (RayError, TimeoutError) as error:
        problem = type(error).__name__
        logger.warning("each ingress replica has its own limits for a moment: %s", problem, extra=FAULT)
