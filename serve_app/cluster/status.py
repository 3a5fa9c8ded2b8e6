"""What state the stages are in, read from Ray Serve's controller and the gate: asking wakes no model."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NotRequired, cast

from ray import serve
from ray.exceptions import RayError
from typing_extensions import TypedDict  # pydantic's condition up to Python 3.11

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray.serve.schema import DeploymentStatusOverview

    from deployments.scaling import GateKeeper, Report

MAX_AGE_S = 1.0
MAX_LAG_S = 5.0
PROCESS_START_S = 5.0
"""A replica that has its GPU reports sooner."""


class StageStatus(TypedDict):
    """One stage of a model, all its replicas together.

    Attributes:
        state: the best of its replicas'.
        replicas: how many are loaded.
        done: tokens that these have drawn (or read, where none are drawn), or denoising steps that they have
            made, since they loaded; those of images that were called off included.
        progress: of its loading, 0 to 1.
        reason: why it failed, or what its loading waits for.
    """

    state: Literal["unloaded", "loading", "ready", "generating", "unloading", "failed"]
    replicas: NotRequired[int]
    done: NotRequired[int]
    progress: NotRequired[float]
    reason: NotRequired[str]


ModelStatuses = dict[str, dict[str, StageStatus]]
"""By model, then by stage (`prior`, `decoder`)."""
HELPER = "helper"
"""What stands for a stage where there is but one: of the safety checker, and of the prompt expander."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A stage as Serve knows it: its deployment's name, and the GPUs of a replica."""

    name: str
    num_gpus: float


class StatusReader:
    """Reads the states of an application's stages.

    Args:
        app_name: of the Serve application.
        deployments: by model, then by stage; the helpers', by their names, as `HELPER`.
        gate: where the replicas report.
        autoscaling: whether missing GPUs are going to come.
    """

    def __init__(
        self,
        app_name: str,
        deployments: dict[str, dict[str, Deployment]],
        gate: GateKeeper,
        *,
        autoscaling: bool,
    ) -> None:
        self._app_name = app_name
        self._deployments = deployments
        self._gate = gate
        self._awaited = "a GPU node" if autoscaling else "a GPU"
        self._reading: asyncio.Task[None] | None = None
        self._statuses: ModelStatuses = {}
        self._read_at = float("-inf")
        self._silent_since: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """Of the models and the helpers."""
        return list(self._deployments)

    async def read(self, *, fresh: bool = False) -> ModelStatuses:
        """The states.

        Args:
            fresh: whether they are to be read now. Else they are a second old at most, or, so that whoever
                asks again and again never waits, those of the last time it asked, up to five seconds ago.
        """
        age = time.monotonic() - self._read_at
        if fresh or (age > MAX_AGE_S and not self._reading):
            self._reading = asyncio.create_task(self._read())
        if self._reading and (fresh or age > MAX_LAG_S):
            await asyncio.shield(self._reading)
        return self._statuses

    async def _read(self) -> None:
        try:
            reports: dict[str, list[Report]] = {}
            with suppress(RayError, TimeoutError):
                reports = await self._gate.ask("reports")
            overviews = await self._overviews()
            self._statuses = {
                model: {
                    stage: self._status(one, overviews[one.name], reports.get(one.name, []))
                    if one.name in overviews
                    else self._last(model, stage)
                    for stage, one in stages.items()
                }
                for model, stages in self._deployments.items()
            }
            self._read_at = time.monotonic()
        finally:
            self._reading = None

    async def replicas(self, models: Iterable[str]) -> int:
        """How many replicas of these models there are now, in any state; one, where Serve does not say."""
        overviews = await self._overviews()
        names = [stage.name for model in models for stage in self._deployments[model].values()]
        return sum(sum(overviews[name].replica_states.values()) if name in overviews else 1 for name in names)

    def _last(self, model: str, stage: str) -> StageStatus:
        """What was known of a stage last."""
        return self._statuses.get(model, {}).get(stage, {"state": "unloaded"})

    async def _overviews(self) -> dict[str, DeploymentStatusOverview]:
        """Serve's word on each deployment; it takes 20 to 50 ms.

        While Serve makes an update ready it may know nothing of some.
        """
        status = await asyncio.to_thread(serve.status)
        return status.applications[self._app_name].deployments

    def _status(
        self, stage: Deployment, overview: DeploymentStatusOverview, reports: list[Report]
    ) -> StageStatus:
        # Declared as enums, and sometimes their bare strings; as enums of strings they are both.
        replicas: dict[Any, int] = dict(overview.replica_states)
        running, starting = replicas.get("RUNNING", 0), replicas.get("STARTING", 0)
        told: dict[str, Any] = {report["state"]: report for report in reports}
        # They run when they have loaded or failed to. One that was killed is heard of for a while yet, and
        # while there is no gate none is.
        ready = min(running, sum(report["state"] == "ready" for report in reports)) if told else running
        if ready:
            status: StageStatus = {"state": "ready", "replicas": ready}
            if told:
                status["done"] = sum(report.get("done", 0) for report in reports)
            return status
        if running:
            return cast("StageStatus", told.get("loading") or told["failed"])
        if starting:
            return told.get("loading") or self._starting(stage)
        self._silent_since.pop(stage.name, None)
        if "STOPPING" in replicas:
            return {"state": "unloading"}
        if overview.status == "UNHEALTHY" or overview.status == "DEPLOY_FAILED":
            return {"state": "failed", "reason": "its process died, see the server's log"}
        return {"state": "unloaded"}

    def _starting(self, stage: Deployment) -> StageStatus:
        """A stage whose replica's process has not said anything yet: it may have no place to run."""
        silent_s = time.monotonic() - self._silent_since.setdefault(stage.name, time.monotonic())
        if stage.num_gpus and silent_s > PROCESS_START_S:
            return {"state": "loading", "reason": f"waiting for {self._awaited}"}
        return {"state": "loading"}
