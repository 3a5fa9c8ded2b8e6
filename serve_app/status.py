"""What state the stages are in, read from Ray Serve's controller and the gate: asking wakes no model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import ray
from ray import serve

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.serve.schema import DeploymentStatusOverview

    from deployments.scaling import Report

MAX_AGE_S = 1.0


class StageStatus(TypedDict):
    """One stage of a model, all its replicas together.

    Attributes:
        state: the best of its replicas'.
        replicas: how many are loaded.
        progress: of its loading, 0 to 1.
        reason: why it failed, or what its loading waits for.
    """

    state: Literal["unloaded", "loading", "ready", "generating", "unloading", "failed"]
    replicas: NotRequired[int]
    progress: NotRequired[float]
    reason: NotRequired[str]


LOADING: StageStatus = {"state": "loading"}
ModelStatuses = dict[str, dict[str, StageStatus]]
"""By model, then by stage (`prior`, `decoder`)."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A stage as Serve knows it: its deployment's name, and the GPUs of a replica."""

    name: str
    num_gpus: float


class StatusReader:
    """Reads the states of an application's stages, at most once a second.

    Args:
        app_name: of the Serve application.
        deployments: by model, then by stage.
        gate: where the replicas report.
        autoscaling: whether missing GPUs are going to come.
    """

    def __init__(
        self,
        app_name: str,
        deployments: dict[str, dict[str, Deployment]],
        gate: ActorHandle[Any],
        *,
        autoscaling: bool,
    ) -> None:
        self._app_name = app_name
        self._deployments = deployments
        self._gate = gate
        self._awaited = "a GPU node" if autoscaling else "a GPU"
        self._lock = asyncio.Lock()
        self._statuses: ModelStatuses = {}
        self._read_at = float("-inf")

    async def read(self, max_age_s: float = MAX_AGE_S) -> ModelStatuses:
        """The states, at most so old."""
        async with self._lock:
            if time.monotonic() - self._read_at > max_age_s:
                reports: dict[str, list[Report]] = await self._gate.reports.remote()
                overviews, free_gpus = await asyncio.to_thread(self._ask_ray)
                self._statuses = {
                    model: {
                        stage: self._status(
                            overviews[one.name],
                            reports.get(one.name, []),
                            lacks_gpus=one.num_gpus > free_gpus,
                        )
                        for stage, one in stages.items()
                    }
                    for model, stages in self._deployments.items()
                }
                self._read_at = time.monotonic()
            return self._statuses

    def _ask_ray(self) -> tuple[dict[str, DeploymentStatusOverview], float]:
        """Serve's word on each deployment, and how many GPUs are free; blocks for 20 to 50 ms."""
        overviews = serve.status().applications[self._app_name].deployments
        return overviews, ray.available_resources().get("GPU", 0)

    def _status(
        self, overview: DeploymentStatusOverview, reports: list[Report], *, lacks_gpus: bool
    ) -> StageStatus:
        # Declared as enums, and sometimes their bare strings; as enums of strings they are both.
        replicas: set[str] = set(overview.replica_states)
        told: dict[str, Any] = {report["state"]: report for report in reports}
        if "RUNNING" in replicas:
            if "ready" in told:
                return {"state": "ready", "replicas": sum(report["state"] == "ready" for report in reports)}
            return told.get("loading") or told.get("failed") or LOADING
        if "STARTING" in replicas:
            waits = lacks_gpus and not told
            return {"state": "loading", "reason": f"waiting for {self._awaited}"} if waits else LOADING
        if "STOPPING" in replicas:
            return {"state": "unloading"}
        if overview.status == "UNHEALTHY" or overview.status == "DEPLOY_FAILED":
            return {"state": "failed", "reason": "its process died, see the server's log"}
        return {"state": "unloaded"}
