"""States of the stages, read from Ray Serve's controller and the demand registry. Reading loads no model."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, cast

from ray import serve
from ray.exceptions import RayError
from typing_extensions import TypedDict  # pydantic's condition up to Python 3.11

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray.serve.schema import DeploymentStatusOverview

    from deployments.scaling import Report
    from serve_app.cluster.actors import ActorClient

MAX_AGE_S = 1.0
MAX_LAG_S = 5.0
PROCESS_START_S = 5.0
"""Seconds after which a replica without a report counts as waiting for a GPU."""


class StageStatus(TypedDict):
    """State of a stage of a model, over all its replicas.

    Attributes:
        state: the best state of its replicas.
        replicas: number of loaded replicas.
        done: tokens generated (or read, where none are generated) or denoising steps made since loading,
            those of aborted images included.
        progress: share of the loading that is done, 0 to 1.
        reason: why it failed, or what its loading waits for.
    """

    state: Literal["unloaded", "loading", "ready", "generating", "unloading", "failed"]
    replicas: NotRequired[int]
    done: NotRequired[int]
    progress: NotRequired[float]
    reason: NotRequired[str]


ModelStatuses = dict[str, dict[str, StageStatus]]
"""States by model, then by stage (`prior`, `decoder`)."""
HELPER = "helper"
"""Name of the only stage of the safety checker, and of the prompt expander."""


class ReplicaReport(NamedTuple):
    """The last report of a replica: see `deployments.scaling.Report`."""

    model: str
    stage: str
    report: Report


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A stage as Serve knows it: the name of its deployment, and the GPUs of a replica."""

    name: str
    num_gpus: float


class StatusReader:
    """Reads the states of an application's stages.

    Args:
        app_name: name of the Serve application.
        deployments: deployments by model, then by stage; those of helpers by name, then `HELPER`.
        registry: has the reports of the replicas.
        autoscaling: whether nodes with GPUs come on demand.
    """

    def __init__(
        self,
        app_name: str,
        deployments: dict[str, dict[str, Deployment]],
        registry: ActorClient,
        *,
        autoscaling: bool,
    ) -> None:
        self._app_name = app_name
        self._deployments = deployments
        self._registry = registry
        self._awaited = "a GPU node" if autoscaling else "a GPU"
        self._reading: asyncio.Task[None] | None = None
        self._statuses: ModelStatuses = {}
        self._read_at = float("-inf")
        self._silent_since: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """Names of the models and the helpers."""
        return list(self._deployments)

    async def read(self, *, fresh: bool = False) -> ModelStatuses:
        """Returns the states.

        Args:
            fresh: whether to read them now, and wait for that. Otherwise they may be up to five seconds old.
                Those older than a second are read again for the next caller.
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
                reports = await self._registry.ask("reports")
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

    async def reports(self) -> list[ReplicaReport]:
        """Returns the last report of each replica of the last ten seconds.

        Raises:
            RayError: the registry has died.
            TimeoutError: it does not answer.
        """
        reports: dict[str, list[Report]] = await self._registry.ask("reports")
        return [
            ReplicaReport(model, stage, report)
            for model, stages in self._deployments.items()
            for stage, one in stages.items()
            for report in reports.get(one.name, [])
        ]

    async def replicas(self, models: Iterable[str]) -> int:
        """Returns the number of replicas of these models in any state. Unknown deployments count as one."""
        overviews = await self._overviews()
        names = [stage.name for model in models for stage in self._deployments[model].values()]
        return sum(sum(overviews[name].replica_states.values()) if name in overviews else 1 for name in names)

    def _last(self, model: str, stage: str) -> StageStatus:
        """Returns the last known state of a stage."""
        return self._statuses.get(model, {}).get(stage, {"state": "unloaded"})

    async def _overviews(self) -> dict[str, DeploymentStatusOverview]:
        """Returns Serve's overview of each deployment, which takes 20 to 50 ms.

        During an update, Serve may know nothing of some deployments.
        """
        status = await asyncio.to_thread(serve.status)
        return status.applications[self._app_name].deployments

    def _status(
        self, stage: Deployment, overview: DeploymentStatusOverview, reports: list[Report]
    ) -> StageStatus:
        # Serve declares enums and sometimes has bare strings. Its enums compare equal to their strings.
        replicas: dict[Any, int] = dict(overview.replica_states)
        running, starting = replicas.get("RUNNING", 0), replicas.get("STARTING", 0)
        reported: dict[str, Any] = {report["state"]: report for report in reports}
        if starting and not running and "loading" not in reported:
            return self._starting(stage)
        self._silent_since.pop(stage.name, None)
        # Replicas run when they have loaded, or failed to. Reports of a killed replica stay for a while, and
        # a new registry has none yet.
        ready = min(running, sum(report["state"] == "ready" for report in reports)) if reported else running
        if ready:
            status: StageStatus = {"state": "ready", "replicas": ready}
            if reported:
                status["done"] = sum(report.get("done", 0) for report in reports)
            return status
        if running:
            return _unready(reported.get("loading") or reported["failed"])
        if starting:
            return _unready(reported["loading"])
        if "STOPPING" in replicas:
            return {"state": "unloading"}
        if overview.status == "UNHEALTHY" or overview.status == "DEPLOY_FAILED":
            return {"state": "failed", "reason": "its process died, see the server's log"}
        return {"state": "unloaded"}

    def _starting(self, stage: Deployment) -> StageStatus:
        """Returns the state of a stage whose replica has not reported: it may wait for a GPU."""
        silent_s = time.monotonic() - self._silent_since.setdefault(stage.name, time.monotonic())
        if stage.num_gpus and silent_s > PROCESS_START_S:
            return {"state": "loading", "reason": f"waiting for {self._awaited}"}
        return {"state": "loading"}


def _unready(report: Report) -> StageStatus:
    """Returns the state of a replica that is loading or has failed."""
    status = {name: value for name, value in report.items() if name in ("state", "progress", "reason")}
    return cast("StageStatus", status)
