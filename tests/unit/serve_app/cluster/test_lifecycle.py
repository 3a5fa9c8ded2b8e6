"""Loading and unloading as the ingress sees it, over stand-ins for the registry and for Serve."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve_app.background import Background
from serve_app.cluster import lifecycle as lifecycle_module
from serve_app.cluster.lifecycle import Lifecycle
from serve_app.errors import Conflict, Unavailable
from serve_app.generation.running import RunningRequest, RunningRequests


class Cluster:
    """Stands in for the generator, the registry and Serve's state of one model, `m`."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.running = RunningRequests(self.changed.set)
        self.units: list[Any] = []
        self.state: dict[str, Any] = {"state": "ready", "replicas": 1}
        self.remaining = 2
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.names = ["m"]

    def lifecycle(self) -> Lifecycle:
        myself: Any = self
        return Lifecycle(myself, self.changed, myself, myself)

    async def ask(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error:
            raise self.error

    async def read(self, *, fresh: bool) -> dict[str, Any]:
        return {"m": {"prior": self.state, "decoder": self.state}}

    async def replicas(self, models: list[str]) -> int:
        self.remaining -= 1
        return self.remaining

    async def request(self, ended: list[str]) -> None:
        """Runs a request until it is stopped."""
        async with self.running.add("m", frozenset(), 1, 60) as running:
            self.make_ready(running)
            try:
                await asyncio.Future()
            finally:
                ended.append("request")

    def make_ready(self, running: RunningRequest) -> None:
        request: Any = object()
        self.running.make_ready(running, request)


def test_an_unload_returns_when_the_replicas_have_stopped() -> None:
    async def main() -> None:
        cluster = Cluster()
        await cluster.lifecycle().unload(["m"], wait_s=0, force=False)
        assert cluster.calls == [("unload", ["m"])]
        assert cluster.remaining == 0

    asyncio.run(main())


def test_a_woken_model_is_reported_once() -> None:
    async def main() -> None:
        cluster = Cluster()
        lifecycle = cluster.lifecycle()
        lifecycle.wake("m")
        assert cluster.changed.is_set()
        report = lifecycle.reporting[0].run
        await report()
        await report()
        assert [needed for _, _, needed in cluster.calls] == [["m"], []]

    asyncio.run(main())


def test_an_unload_is_rejected_while_requests_run() -> None:
    async def main() -> None:
        cluster, ended = Cluster(), list[str]()
        request = asyncio.create_task(cluster.request(ended))
        await asyncio.sleep(0)
        with pytest.raises(Conflict, match="1 generations are running") as caught:
            await cluster.lifecycle().unload(["m"], wait_s=0.01, force=False)
        assert (caught.value.code, caught.value.retryable) == ("generating", True)
        assert (cluster.calls, ended) == ([], [])
        await cluster.lifecycle().unload(["other"], wait_s=0, force=False)
        request.cancel()

    asyncio.run(main())


def test_an_unload_waits_for_the_end_of_the_requests() -> None:
    async def main() -> None:
        cluster, ended = Cluster(), list[str]()
        request = asyncio.create_task(cluster.request(ended))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, request.cancel)
        await cluster.lifecycle().unload(["m"], wait_s=5, force=False)
        assert (ended, cluster.calls) == (["request"], [("unload", ["m"])])

    asyncio.run(main())


def test_a_forced_unload_aborts_the_requests() -> None:
    async def main() -> None:
        cluster, ended = Cluster(), list[str]()
        request = asyncio.create_task(cluster.request(ended))
        await asyncio.sleep(0)
        await cluster.lifecycle().unload(["m"], wait_s=0, force=True)
        assert (ended, cluster.calls) == (["request"], [("unload", ["m"])])
        with pytest.raises(Unavailable) as caught:
            await request
        assert (caught.value.code, caught.value.retryable) == ("unloaded", False)

    asyncio.run(main())


def test_a_forced_unload_says_that_new_requests_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "UNLOAD_TIMEOUT_S", 0.1)

    async def main() -> None:
        cluster, ended = Cluster(), list[str]()
        requests = [asyncio.create_task(cluster.request(ended))]
        await asyncio.sleep(0)
        unload = asyncio.create_task(cluster.lifecycle().unload(["m"], wait_s=0, force=True))
        await asyncio.sleep(0)
        requests.append(asyncio.create_task(cluster.request(ended)))
        with pytest.raises(Conflict, match="Others were stopped, and these have begun since"):
            await unload
        requests[1].cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    asyncio.run(main())


def test_a_registry_that_does_not_answer_does_not_stop_the_reports_to_the_other_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle_module, "RENEWAL_S", 0.01)

    async def main() -> None:
        cluster, reports = Cluster(), asyncio.Queue[dict[str, int]]()

        async def no_answer(*_: object) -> None:
            await asyncio.Future()

        async def report(running: dict[str, int]) -> list[str]:
            reports.put_nowait(running)
            return []

        generator: Any = cluster
        status: Any = cluster
        registry: Any = SimpleNamespace(ask=no_answer)
        fleet: Any = SimpleNamespace(report=report)
        lifecycle = Lifecycle(generator, cluster.changed, registry, status, fleet)
        async with Background().run(lifecycle.reporting), asyncio.timeout(10):
            for _ in range(3):
                await reports.get()

    asyncio.run(main())


def test_an_unload_of_replicas_that_do_not_stop_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "UNLOAD_TIMEOUT_S", 0.1)

    async def main(*, remaining: int, error: Exception | None) -> None:
        cluster = Cluster()
        cluster.remaining, cluster.error = remaining, error
        with pytest.raises(Unavailable, match="did not stop") as caught:
            await cluster.lifecycle().unload(["m"], wait_s=0, force=False)
        assert (caught.value.code, caught.value.retry_after_s) == ("unload_failed", 5)

    asyncio.run(main(remaining=10**6, error=None))
    asyncio.run(main(remaining=2, error=ActorDiedError()))


def test_a_model_that_a_request_needs_is_loading_and_not_unloaded() -> None:
    async def main() -> None:
        cluster = Cluster()
        cluster.state = {"state": "unloaded"}
        lifecycle = cluster.lifecycle()
        assert (await lifecycle.statuses())["m"]["prior"] == {"state": "unloaded"}
        async with cluster.running.add("m", frozenset(), 1, 60) as running:
            assert (await lifecycle.statuses())["m"]["prior"] == {"state": "unloaded"}, (
                "it is not accepted yet"
            )
            cluster.make_ready(running)
            assert (await lifecycle.statuses())["m"]["prior"] == {"state": "loading"}

    asyncio.run(main())


def test_a_stage_that_works_on_an_image_is_generating() -> None:
    class Progress:
        stage = "decoder"

    class Unit:
        model, progress = "m", Progress()

    async def main() -> None:
        cluster = Cluster()
        cluster.units = [Unit()]
        states = (await cluster.lifecycle().statuses())["m"]
        assert {stage: status["state"] for stage, status in states.items()} == {
            "prior": "ready",
            "decoder": "generating",
        }

    asyncio.run(main())
