"""The number of a stage's replicas, and the demand registry."""

import asyncio
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError

from deployments import scaling
from deployments.scaling import DemandRegistry, Report, ScalingOrder, ScalingPolicy

IDLE_S = 30


class Stage:
    """A stage whose number of replicas follows the policy as in Serve."""

    def __init__(self, min_replicas: int = 0) -> None:
        self.policy = ScalingPolicy("m", min_replicas=min_replicas, idle_timeout_s=IDLE_S)
        self.replicas = 0

    def at(
        self, now: float, *, load: float = 0, needed: bool = False, unloaded_at: float = 0, starting: int = 0
    ) -> int:
        wanted = self.policy.decide(
            load=load,
            replicas=self.replicas,
            running=self.replicas - starting,
            needed=needed,
            unloaded_at=unloaded_at,
            now=now,
        )
        # Serve scales to one before zero (`_apply_delay_logic` in ray/serve/autoscaling_policy.py).
        self.replicas = 1 if self.replicas > 1 and wanted == 0 else wanted
        return self.replicas


def test_nothing_is_loaded_before_it_is_needed() -> None:
    assert Stage().at(0) == 0
    assert Stage(min_replicas=2).at(0) == 2


def test_a_model_that_is_needed_has_both_stages_whatever_their_load() -> None:
    assert Stage().at(0, needed=True) == 1


def test_there_are_as_many_replicas_as_the_load_needs() -> None:
    stage = Stage()
    assert [stage.at(0, load=load) for load in (0.1, 1, 1.1, 4)] == [1, 1, 2, 4]


def test_spare_replicas_stop_after_the_idle_time() -> None:
    stage = Stage()
    stage.at(0, load=4)
    assert stage.at(1, load=1) == 4
    assert stage.at(IDLE_S, load=2) == 4
    assert stage.at(IDLE_S + 1, load=1) == 2  # the most that was wanted in that time
    assert stage.at(IDLE_S + 2) == 2
    assert stage.at(2 * IDLE_S + 2) == 1
    assert stage.at(2 * IDLE_S + 2.1) == 0


def test_a_need_restarts_the_idle_time() -> None:
    stage = Stage()
    stage.at(0, needed=True)
    stage.at(1)
    stage.at(IDLE_S, needed=True)
    assert stage.at(IDLE_S + 1) == 1
    assert stage.at(2 * IDLE_S) == 1
    assert stage.at(2 * IDLE_S + 1) == 0


def test_several_idle_replicas_stop_together() -> None:
    stage = Stage()
    stage.at(0, load=4)
    assert stage.at(1) == 4
    assert stage.at(IDLE_S + 1) == 1
    assert stage.at(IDLE_S + 1.1) == 0


def test_a_loading_replica_is_not_idle_even_if_no_request_waits() -> None:
    stage = Stage()
    stage.at(0, needed=True)
    assert stage.at(2 * IDLE_S, starting=1) == 1
    assert stage.at(3 * IDLE_S) == 1
    assert stage.at(4 * IDLE_S) == 0


def test_a_replica_that_cannot_start_keeps_no_idle_one_alive() -> None:
    stage = Stage()
    stage.at(0, load=8)
    assert stage.at(1, starting=4) == 8
    assert stage.at(IDLE_S + 1, starting=4) == 1
    assert stage.at(IDLE_S + 1.1) == 0


def test_an_unload_counts_although_the_clock_was_set_back() -> None:
    stage = Stage()
    stage.at(0, needed=True, unloaded_at=1000)
    assert stage.at(1, needed=True, unloaded_at=1000) == 1
    assert stage.at(2, unloaded_at=990) == 0


@pytest.mark.parametrize("min_replicas", [0, 2])
def test_an_unloaded_model_stays_so_until_it_is_needed(min_replicas: int) -> None:
    stage = Stage(min_replicas)
    stage.at(0, load=3)
    assert stage.at(1, load=3, unloaded_at=5) == 1
    assert stage.at(1.1, load=3, unloaded_at=5) == 0
    assert stage.at(2, unloaded_at=5) == 0
    assert stage.at(1000, unloaded_at=5) == 0
    assert stage.at(1001, unloaded_at=5, needed=True) == max(1, min_replicas)
    assert stage.at(1001 + 2 * IDLE_S, unloaded_at=5, needed=True) == max(1, min_replicas)


def test_a_need_during_an_unload_waits_for_its_end() -> None:
    stage = Stage()
    stage.at(0, load=2)
    assert stage.at(1, unloaded_at=5) == 1
    assert stage.at(1.1, needed=True, unloaded_at=5) == 0
    assert stage.at(1.2, needed=True, unloaded_at=5) == 1


def test_a_replica_that_serve_started_for_a_queue_is_kept_only_if_needed() -> None:
    """With a queue and no replicas, Serve starts one without asking the policy."""
    for needed, left in ((True, 1), (False, 0)):
        stage = Stage()
        stage.at(0, needed=True)
        assert stage.at(1, unloaded_at=5) == 0
        stage.replicas = 1
        assert stage.at(2, needed=needed, unloaded_at=5) == left


def test_a_new_registry_unloads_nothing() -> None:
    stage = Stage()
    stage.at(0, needed=True, unloaded_at=5)
    assert stage.at(1, needed=True, unloaded_at=5) == 1
    assert stage.at(2, unloaded_at=0) == 1


def test_the_registry_answers_when_the_order_changes() -> None:
    async def all_orders() -> list[ScalingOrder]:
        registry = DemandRegistry()
        orders = [await registry.order("m", None)]
        for change in (
            registry.need("one", ["other", "m"]),
            registry.unload(["m"]),
            registry.need("one", ["m", "other"]),
        ):
            waiting = asyncio.create_task(registry.order("m", orders[-1]))
            await asyncio.sleep(0)
            assert not waiting.done()
            await change
            orders.append(await waiting)
        return orders

    before = time.time()
    first, needed, unloaded, again = asyncio.run(all_orders())
    assert (first, needed) == ((False, 0), (True, 0))
    assert not unloaded[0], "an unloaded model is no longer needed"
    assert before <= unloaded[1] <= time.time()
    assert again == (True, unloaded[1])


def test_the_registry_answers_after_a_lease_if_nothing_changes() -> None:
    assert asyncio.run(DemandRegistry(lease_s=0.01).order("m", (False, 0))) == (False, 0)


def test_the_needs_of_a_dead_ingress_expire() -> None:
    async def expire() -> ScalingOrder:
        registry = DemandRegistry(lease_s=0.01)
        await registry.need("one", ["m"])
        return await registry.order("m", (True, 0))

    assert asyncio.run(expire()) == (False, 0)


def test_the_needs_of_all_ingresses_count() -> None:
    async def order() -> ScalingOrder:
        registry = DemandRegistry()
        await registry.need("one", ["m"])
        await registry.need("two", [])
        return await registry.order("m", None)

    assert asyncio.run(order()) == (True, 0)


def test_a_report_is_kept_until_its_replica_leaves_or_dies() -> None:
    async def reports(lease_s: float) -> dict[str, list[Report]]:
        registry = DemandRegistry(lease_s)
        await registry.report("prior", "a", {"state": "loading"})
        await registry.report("prior", "b", {"state": "ready"})
        await registry.report("prior", "a", {"state": "failed"})
        await registry.report("decoder", "c", {"state": "ready"})
        await registry.report("decoder", "c", None)
        return await registry.reports()

    assert asyncio.run(reports(5)) == {"prior": [{"state": "ready"}, {"state": "failed"}]}
    assert asyncio.run(reports(0)) == {}


def test_an_unload_after_the_registry_was_lost_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[ScalingOrder | RayError] = [(False, 5.0), RayActorError(), (False, 6.0)]

    def order(*_: object) -> SimpleNamespace:
        answer: Future[ScalingOrder] = Future()
        if not answers:
            return SimpleNamespace(future=lambda: answer)
        result = answers.pop(0)
        if isinstance(result, RayError):
            answer.set_exception(result)
        else:
            answer.set_result(result)
        return SimpleNamespace(future=lambda: answer)

    registry = SimpleNamespace(order=SimpleNamespace(remote=order))
    monkeypatch.setattr(scaling, "find_registry", lambda _: registry)
    monkeypatch.setattr(scaling, "POLL_INTERVAL_S", -1)
    policy = ScalingPolicy("m", min_replicas=0, idle_timeout_s=IDLE_S)
    context: Any = SimpleNamespace(
        app_name="app", config=None, total_num_requests=0, target_num_replicas=1, current_num_replicas=1
    )
    targets = [policy(context)[0] for _ in range(8)]
    assert targets[0] == 1  # the unload at 5 was before this policy's time
    assert 0 in targets
