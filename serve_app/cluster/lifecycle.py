"""Loading and unloading as the ingress sees it: it reports which models it needs, and unloads models."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from deployments.scaling import RENEWAL_S
from serve_app.background import Periodic
from serve_app.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from collections.abc import Collection

    from serve_app.cluster.actors import ActorClient
    from serve_app.cluster.fleet import FleetClient
    from serve_app.cluster.status import ModelStatuses, ReplicaReport, StageStatus, StatusReader
    from serve_app.generation.generator import Generator

UNLOAD_TIMEOUT_S = 60
"""Seconds after which an unload fails. Idle replicas take less to stop."""
POLL_INTERVAL_S = 0.05


class Lifecycle:
    """Reports this ingress's needs to the demand registry, and unloads models.

    Args:
        generator: has the requests that need the models.
        changed: set when a request is ready for its model, and when it ends.
        registry: the demand registry.
        status: reads the states of the replicas.
        fleet: the limits of all ingress replicas together; None for a replica alone.
    """

    def __init__(
        self,
        generator: Generator,
        changed: asyncio.Event,
        registry: ActorClient,
        status: StatusReader,
        fleet: FleetClient | None = None,
    ) -> None:
        self._generator = generator
        self._changed = changed
        self._registry = registry
        self._status = status
        self._fleet = fleet
        self._woken: set[str] = set()
        self._report_due = asyncio.Event()
        self._ingress = uuid.uuid4().hex

    @property
    def reporting(self) -> list[Periodic]:
        """The periodic tasks that report the needs, at every change and before the last report expires.

        They are separate, so that a demand registry that does not answer does not suspend the limits that
        the ingress replicas have together.
        """
        tasks = [
            Periodic(
                name="report demand",
                run=self._report_demand,
                interval_s=RENEWAL_S,
                wake=self._changed,
                expected=(RayError, TimeoutError),
            )
        ]
        if self._fleet:
            tasks.append(
                Periodic(
                    name="report to other replicas",
                    run=partial(self._report_to, self._fleet),
                    interval_s=RENEWAL_S,
                    wake=self._report_due,
                    expected=(RayError, TimeoutError),
                )
            )
        return tasks

    async def _report_demand(self) -> None:
        self._report_due.set()
        woken, self._woken = self._woken, set()
        await self._registry.ask("need", self._ingress, sorted(woken.union(self._generator.running.needed())))

    def wake(self, model: str) -> None:
        """Loads a model that no request needs yet. It unloads again after its idle time.

        One report is enough: a stage that loads does not stop, and then its idle time begins.
        """
        self._woken.add(model)
        self._changed.set()

    async def _report_to(self, fleet: FleetClient) -> None:
        running = self._generator.running
        running.abort(await fleet.report(running.counts()))

    @property
    def names(self) -> list[str]:
        """Names of everything that can be unloaded: models and helpers."""
        return self._status.names

    async def statuses(self, *, fresh: bool = False) -> ModelStatuses:
        """Returns the states of all stages; see `StatusReader.read`. Loads no model."""
        busy = {(unit.model, unit.progress.stage) for unit in self._generator.units if unit.progress}
        needed = self._generator.running.needed()

        def now(model: str, stage: str, status: StageStatus) -> StageStatus:
            if status["state"] == "ready" and (model, stage) in busy:
                return {**status, "state": "generating"}
            if status["state"] == "unloaded" and model in needed:
                return {"state": "loading"}
            return status

        return {
            model: {stage: now(model, stage, status) for stage, status in stages.items()}
            for model, stages in (await self._status.read(fresh=fresh)).items()
        }

    async def reports(self) -> list[ReplicaReport]:
        """Returns the reports of the replicas; none while the registry does not answer."""
        with suppress(RayError, TimeoutError):
            return await self._status.reports()
        return []

    async def unload(self, models: Collection[str], *, wait_s: float, force: bool) -> None:
        """Unloads models; returns when their replicas have stopped.

        Args:
            models: names of models and helpers.
            wait_s: seconds to wait until no request of theirs runs.
            force: whether to abort their requests instead.

        Raises:
            Conflict: there are running requests.
            Unavailable: the replicas do not stop.
        """
        try:
            if count := await self._stop_requests(models, UNLOAD_TIMEOUT_S if force else wait_s, force=force):
                remedy = "Unload with ?wait=true when they have ended, or stop them with ?force=true."
                if force:
                    remedy = "Others were stopped, and these have begun since. Try again."
                raise Conflict(
                    f"{count} generations are running. {remedy}", code="generating", retryable=True
                )
            await self._registry.ask("unload", list(models))
            async with asyncio.timeout(UNLOAD_TIMEOUT_S):
                while await self._remain(models):  # noqa: ASYNC110 - Serve has no event for it
                    await asyncio.sleep(POLL_INTERVAL_S)
        except (RayError, TimeoutError):
            raise Unavailable(
                "The replicas did not stop; try again, or see the server's log.",
                code="unload_failed",
                retry_after_s=5,
            ) from None

    async def _stop_requests(self, models: Collection[str], wait_s: float, *, force: bool) -> int:
        """Aborts or awaits the requests of these models; returns the number of those that still run."""
        running = self._generator.running
        if force:
            running.abort(models)
            if self._fleet:
                await self._fleet.abort(models)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await running.until_idle(models)
                while self._fleet and await self._fleet.running(models):  # noqa: ASYNC110 - an actor has no event
                    await asyncio.sleep(POLL_INTERVAL_S)
        return await self._count(models)

    async def _count(self, models: Collection[str]) -> int:
        """Returns the number of running requests of these models, in all ingress replicas."""
        elsewhere = await self._fleet.running(models) if self._fleet else 0
        return self._generator.running.count(models) + elsewhere

    async def _remain(self, models: Collection[str]) -> bool:
        """Returns whether there are replicas still. A new request loads them again, which ends the wait."""
        return not await self._count(models) and bool(await self._status.replicas(models))
