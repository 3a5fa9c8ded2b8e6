"""Loading and unloading, seen from the ingress: it tells which models it needs, and has them go."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from deployments.scaling import RENEWAL_S
from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from deployments.scaling import GateKeeper
    from serve_app.cluster.status import ModelStatuses, StageStatus, StatusReader
    from serve_app.generation.generator import Generator

UNLOAD_S = 60
"""More than idle replicas ever take to go."""
LOOK_AGAIN_S = 0.05


class Lifecycle:
    """Tells the gate what this ingress needs, and unloads models.

    Args:
        generator: whose requests need the models.
        changed: set when a request comes or goes.
        gate: where the policies ask.
        status: tells when the replicas are gone.
    """

    def __init__(
        self, generator: Generator, changed: asyncio.Event, gate: GateKeeper, status: StatusReader
    ) -> None:
        self._generator = generator
        self._changed = changed
        self._gate = gate
        self._status = status

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Within the block the gate is told, at every change and again and again, which models are needed."""
        telling = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            telling.cancel()

    async def _tell(self) -> None:
        ingress = uuid.uuid4().hex
        while True:
            self._changed.clear()
            needed = self._generator.needed()
            with suppress(RayError, TimeoutError):
                await self._gate.ask("need", ingress, needed)
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL_S if needed else None):
                    await self._changed.wait()

    @property
    def names(self) -> list[str]:
        """Of all that can be unloaded: the models and the helpers."""
        return self._status.names

    async def statuses(self, *, fresh: bool = False) -> ModelStatuses:
        """Each stage's, see `StatusReader.read`; asking wakes no model."""
        busy = {(unit.model, unit.progress.stage) for unit in self._generator.units if unit.progress}
        needed = self._generator.needed()

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

    async def unload(self, models: Collection[str], *, wait_s: float, force: bool) -> None:
        """Have these models' replicas go, and return when they are gone.

        Args:
            models: by their names, and helpers by theirs.
            wait_s: how long to wait until no request of theirs is running.
            force: whether to call them off instead.

        Raises:
            RequestError: 409, there are running requests; 503, the replicas stay.
        """
        if force:
            self._generator.call_off(models)
        with suppress(TimeoutError):
            async with asyncio.timeout(UNLOAD_S if force else wait_s):
                await self._generator.until_idle(models)
        if running := self._generator.count(models):
            raise RequestError(
                f"{running} generations are running. Unload with ?wait=true when they have ended, or with "
                "?force=true stop them.",
                code="generating",
                status=409,
            )
        try:
            await self._gate.ask("unload", list(models))
            async with asyncio.timeout(UNLOAD_S):
                while await self._remain(models):  # noqa: ASYNC110 - Serve tells nobody
                    await asyncio.sleep(LOOK_AGAIN_S)
        except (RayError, TimeoutError):
            raise RequestError(
                "The replicas have not gone; try again, or see the server's log.",
                code="unload_failed",
                status=503,
                headers={"Retry-After": "5"},
            ) from None

    async def _remain(self, models: Collection[str]) -> bool:
        """Whether there are replicas still; when somebody needs a model again there always will be."""
        return not self._generator.count(models) and bool(await self._status.replicas(models))
