"""What state the stages are in, read from Ray Serve's controller: asking wakes no model."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal

from ray import serve

if TYPE_CHECKING:
    from ray.serve.schema import DeploymentStatusOverview

StageState = Literal["unloaded", "loading", "ready", "unloading", "failed"]
ModelStates = dict[str, dict[str, StageState]]
"""By model, then by stage (`prior`, `decoder`)."""

MAX_AGE_S = 1.0


class StatusReader:
    """Reads the states of an application's stages, at most once a second.

    Args:
        app_name: of the Serve application.
        deployments: by model, then by stage, the name of its deployment.
    """

    def __init__(self, app_name: str, deployments: dict[str, dict[str, str]]) -> None:
        self._app_name = app_name
        self._deployments = deployments
        self._lock = asyncio.Lock()
        self._states: ModelStates = {}
        self._read_at = float("-inf")

    async def read(self) -> ModelStates:
        """The states, at most a second old."""
        async with self._lock:
            if time.monotonic() - self._read_at > MAX_AGE_S:
                status = await asyncio.to_thread(serve.status)  # blocks on the controller for 20-50 ms
                overviews = status.applications[self._app_name].deployments
                self._states = {
                    model: {stage: _state(overviews[name]) for stage, name in stages.items()}
                    for model, stages in self._deployments.items()
                }
                self._read_at = time.monotonic()
            return self._states


def _state(overview: DeploymentStatusOverview) -> StageState:
    # Declared as enums, and sometimes their bare strings; as enums of strings they are both.
    replicas: set[str] = set(overview.replica_states)
    status: str = overview.status
    if "RUNNING" in replicas:
        return "ready"
    if status == "DEPLOY_FAILED":
        return "failed"
    if "STARTING" in replicas:
        return "loading"
    if status == "UNHEALTHY":
        return "failed"
    if "STOPPING" in replicas:
        return "unloading"
    return "unloaded"
