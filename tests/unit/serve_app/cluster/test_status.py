"""The state of a stage, from Serve's counts of its replicas and from their reports."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.schema import DeploymentStatusOverview

from serve_app.cluster import status
from serve_app.cluster.status import Deployment, ReplicaReport, StatusReader

READY, LOADING = {"state": "ready", "done": 5}, {"state": "loading", "progress": 0.4}
FAILED = {"state": "failed", "reason": "no such folder"}


class Registry:
    """Returns given reports. None stands for a registry that has died."""

    def __init__(self, reports: list[dict[str, Any]] | None) -> None:
        self._reports = reports

    async def ask(self, method: str) -> dict[str, list[dict[str, Any]]]:
        assert method == "reports"
        if self._reports is None:
            raise ActorDiedError
        return {"d": self._reports}


class Serve:
    """Serve's status of one deployment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replicas: dict[str, int] = {}
        self.health = "HEALTHY"
        self.updating = False
        self.reads = 0
        monkeypatch.setattr(serve, "status", self._status)

    def _status(self) -> Any:
        self.reads += 1
        of_a_deployment: Any = DeploymentStatusOverview
        overview = of_a_deployment(self.health, "AUTOSCALING", self.replicas, "")
        deployments = {} if self.updating else {"d": overview}
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return Serve(monkeypatch)


def reader(
    reports: list[dict[str, Any]] | None, *, num_gpus: float = 0, autoscaling: bool = False
) -> StatusReader:
    registry: Any = Registry(reports)
    deployments = {"m": {"prior": Deployment(name="d", num_gpus=num_gpus)}}
    return StatusReader("app", deployments, registry, autoscaling=autoscaling)


@pytest.mark.parametrize(
    ("replicas", "reports", "expected"),
    [
        ({}, [], {"state": "unloaded"}),
        ({}, [READY], {"state": "unloaded"}),  # a replica that was killed
        ({"STARTING": 1}, [], {"state": "loading"}),
        ({"STARTING": 1}, [LOADING], LOADING),
        ({"RUNNING": 1}, [READY], {"state": "ready", "replicas": 1, "done": 5}),
        (
            {"RUNNING": 2, "STARTING": 1},
            [READY, READY, LOADING],
            {"state": "ready", "replicas": 2, "done": 10},
        ),
        ({"RUNNING": 1}, [], {"state": "ready", "replicas": 1}),
        ({"RUNNING": 1}, None, {"state": "ready", "replicas": 1}),
        ({"RUNNING": 1}, [FAILED], FAILED),
        ({"RUNNING": 1}, [LOADING], LOADING),  # it had failed, and tries again
        ({"RUNNING": 2}, [FAILED, READY], {"state": "ready", "replicas": 1, "done": 5}),
        (
            {"RUNNING": 1, "STARTING": 1},
            [READY, FAILED, LOADING],
            {"state": "ready", "replicas": 1, "done": 5},
        ),
        ({"RUNNING": 1, "STOPPING": 1}, [READY, READY], {"state": "ready", "replicas": 1, "done": 10}),
        ({"STOPPING": 1}, [READY], {"state": "unloading"}),
    ],
)
def test_a_stage_has_the_best_state_of_its_replicas(
    controller: Serve,
    replicas: dict[str, int],
    reports: list[dict[str, Any]] | None,
    expected: dict[str, Any],
) -> None:
    controller.replicas = replicas
    assert asyncio.run(reader(reports).read()) == {"m": {"prior": expected}}


def test_what_a_replica_measured_is_in_its_report_alone(controller: Serve) -> None:
    report = LOADING | {"device": "CPU", "memory": {"resident": 5}}
    controller.replicas = {"STARTING": 1}
    one = reader([report])
    assert asyncio.run(one.read()) == {"m": {"prior": LOADING}}
    assert asyncio.run(one.reports()) == [ReplicaReport("m", "prior", report)]


def test_a_stage_whose_processes_keep_dying_is_failed(controller: Serve) -> None:
    controller.health = "DEPLOY_FAILED"
    stage = asyncio.run(reader([]).read())["m"]["prior"]
    assert stage["state"] == "failed"
    assert "log" in stage["reason"]


@pytest.mark.parametrize(
    ("autoscaling", "reason"), [(True, "waiting for a GPU node"), (False, "waiting for a GPU")]
)
def test_a_replica_without_a_report_waits_for_a_gpu(
    controller: Serve, monkeypatch: pytest.MonkeyPatch, autoscaling: bool, reason: str
) -> None:
    controller.replicas = {"STARTING": 1}
    stages = reader([], num_gpus=1, autoscaling=autoscaling)

    async def read_twice() -> list[Any]:
        first = await stages.read()
        monkeypatch.setattr(status, "PROCESS_START_S", 0)
        return [first["m"]["prior"], (await stages.read(fresh=True))["m"]["prior"]]

    assert asyncio.run(read_twice()) == [{"state": "loading"}, {"state": "loading", "reason": reason}]


def test_a_replica_that_replaces_a_dead_one_has_its_own_time_to_start(
    controller: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stages = reader([], num_gpus=1)

    async def read_later() -> list[Any]:
        nonlocal now
        seen = []
        for replicas in ({"STARTING": 1}, {"RUNNING": 1}, {"STARTING": 1}):
            controller.replicas = replicas
            seen.append((await stages.read(fresh=True))["m"]["prior"])
            now += 2 * status.PROCESS_START_S
        return seen

    assert asyncio.run(read_later()) == [
        {"state": "loading"},
        {"state": "ready", "replicas": 1},
        {"state": "loading"},
    ]


def test_a_polling_client_does_not_wait_and_serve_is_read_once_a_second(
    controller: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.replicas = {"RUNNING": 1}
    stages = reader([READY])

    async def read() -> list[str]:
        states: list[str] = [(await stages.read())["m"]["prior"]["state"] for _ in range(10)]
        assert controller.reads == 1
        controller.replicas = {}
        monkeypatch.setattr(status, "MAX_AGE_S", 0)
        states.append((await stages.read())["m"]["prior"]["state"])
        states.append((await stages.read(fresh=True))["m"]["prior"]["state"])
        return states

    assert asyncio.run(read()) == [*["ready"] * 11, "unloaded"]


def test_replicas_are_counted_in_any_state(controller: Serve) -> None:
    controller.replicas = {"RUNNING": 2, "STARTING": 1, "STOPPING": 3}
    assert asyncio.run(reader([]).replicas(["m"])) == 6


def test_the_last_known_state_holds_while_serve_prepares_an_update(controller: Serve) -> None:
    controller.replicas = {"RUNNING": 1}
    stages = reader([READY])

    async def read() -> list[str]:
        controller.updating = True
        states: list[str] = [(await stages.read(fresh=True))["m"]["prior"]["state"]]
        controller.updating = False
        states.append((await stages.read(fresh=True))["m"]["prior"]["state"])
        controller.updating = True
        states.append((await stages.read(fresh=True))["m"]["prior"]["state"])
        assert await stages.replicas(["m"]) > 0, "no report says that they are gone"
        return states

    assert asyncio.run(read()) == ["unloaded", "ready", "ready"]
