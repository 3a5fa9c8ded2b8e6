"""How many replicas a stage is to have, what the gate remembers, and loading beside the event loop."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from deployments.errors import EngineFault, LoadingFailed
from deployments.scaling import Gate, Report, ScalingPolicy
from deployments.stages.loading import Loader

IDLE_S = 30


class Stage:
    """A stage whose replicas are as many as Serve makes of what the policy says."""

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
        # From several Serve goes to one first (`_apply_delay_logic` in ray/serve/autoscaling_policy.py).
        self.replicas = 1 if self.replicas > 1 and wanted == 0 else wanted
        return self.replicas


def test_nothing_is_loaded_before_it_is_needed() -> None:
    assert Stage().at(0) == 0
    assert Stage(min_replicas=2).at(0) == 2


def test_a_model_that_is_needed_has_both_stages_whatever_their_load() -> None:
    assert Stage().at(0, needed=True) == 1


def test_there_are_as_many_as_the_load_asks_for() -> None:
    stage = Stage()
    assert [stage.at(0, load=load) for load in (0.1, 1, 1.1, 4)] == [1, 1, 2, 4]


def test_those_that_are_not_needed_go_after_the_idle_time() -> None:
    stage = Stage()
    stage.at(0, load=4)
    assert stage.at(1, load=1) == 4
    assert stage.at(IDLE_S, load=2) == 4
    assert stage.at(IDLE_S + 1, load=1) == 2  # the most that was wanted meanwhile
    assert stage.at(IDLE_S + 2) == 2
    assert stage.at(2 * IDLE_S + 2) == 1
    assert stage.at(2 * IDLE_S + 2.1) == 0


def test_a_need_puts_the_idle_time_off() -> None:
    stage = Stage()
    stage.at(0, needed=True)
    stage.at(1)
    stage.at(IDLE_S, needed=True)
    assert stage.at(IDLE_S + 1) == 1
    assert stage.at(2 * IDLE_S) == 1
    assert stage.at(2 * IDLE_S + 1) == 0


def test_several_idle_ones_go_together() -> None:
    stage = Stage()
    stage.at(0, load=4)
    assert stage.at(1) == 4
    assert stage.at(IDLE_S + 1) == 1
    assert stage.at(IDLE_S + 1.1) == 0


def test_what_is_loading_is_not_idle_though_nobody_waits_for_it_any_more() -> None:
    stage = Stage()
    stage.at(0, needed=True)
    assert stage.at(2 * IDLE_S, starting=1) == 1
    assert stage.at(3 * IDLE_S) == 1
    assert stage.at(4 * IDLE_S) == 0


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


def test_what_serve_has_started_for_a_queue_is_kept_if_it_is_needed_and_else_goes() -> None:
    """With none running and a queue, Serve starts one without asking the policy."""
    for needed, left in ((True, 1), (False, 0)):
        stage = Stage()
        stage.at(0, needed=True)
        assert stage.at(1, unloaded_at=5) == 0
        stage.replicas = 1
        assert stage.at(2, needed=needed, unloaded_at=5) == left


def test_a_gate_that_has_forgotten_unloads_nothing() -> None:
    stage = Stage()
    stage.at(0, needed=True, unloaded_at=5)
    assert stage.at(1, needed=True, unloaded_at=5) == 1
    assert stage.at(2, unloaded_at=0) == 1


def test_the_gate_tells_what_has_changed() -> None:
    async def told() -> list[tuple[bool, float]]:
        gate = Gate()
        orders = [await gate.orders("m", None)]
        for change in (
            gate.need("one", ["other", "m"]),
            gate.unload(["m"]),
            gate.need("one", ["m", "other"]),
        ):
            waiting = asyncio.create_task(gate.orders("m", orders[-1]))
            await asyncio.sleep(0)
            assert not waiting.done()
            await change
            orders.append(await waiting)
        return orders

    before = time.time()
    first, needed, unloaded, again = asyncio.run(told())
    assert (first, needed) == ((False, 0), (True, 0))
    assert not unloaded[0], "what is unloaded is needed no more"
    assert before <= unloaded[1] <= time.time()
    assert again == (True, unloaded[1])


def test_the_gate_answers_after_a_while_though_nothing_has_changed() -> None:
    assert asyncio.run(Gate(lease_s=0.01).orders("m", (False, 0))) == (False, 0)


def test_what_an_ingress_that_died_needed_lapses() -> None:
    async def lapse() -> tuple[bool, float]:
        gate = Gate(lease_s=0.01)
        await gate.need("one", ["m"])
        return await gate.orders("m", (True, 0))

    assert asyncio.run(lapse()) == (False, 0)


def test_one_ingress_needs_what_another_one_does_not() -> None:
    async def orders() -> tuple[bool, float]:
        gate = Gate()
        await gate.need("one", ["m"])
        await gate.need("two", [])
        return await gate.orders("m", None)

    assert asyncio.run(orders()) == (True, 0)


def test_reports_are_kept_by_replica_until_it_goes_or_dies() -> None:
    async def reports(lease_s: float) -> dict[str, list[Report]]:
        gate = Gate(lease_s)
        await gate.report("prior", "a", {"state": "loading"})
        await gate.report("prior", "b", {"state": "ready"})
        await gate.report("prior", "a", {"state": "failed"})
        await gate.report("decoder", "c", {"state": "ready"})
        await gate.report("decoder", "c", None)
        return await gate.reports()

    assert asyncio.run(reports(5)) == {"prior": [{"state": "ready"}, {"state": "failed"}]}
    assert asyncio.run(reports(0)) == {}


class Engine:
    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.done = 0
        self.unit = "steps"


class Loading:
    """A loader whose tries end when they are let: with an engine, or as the list of failures says."""

    def __init__(self, failures: list[Exception | None]) -> None:
        self.failures = failures
        self.tries = 0
        self.go_on = threading.Event()
        self.told: list[Report] = []
        self.loader: Loader[Engine] = Loader(self._load, cpu_threads=None, tell=self._tell)

    def _tell(self, report: Callable[[], Report]) -> None:
        self.told.append(report())

    def _load(self, report: Callable[[float], None]) -> Engine:
        self.tries += 1
        report(0.5)
        assert self.go_on.wait(10)
        if failure := self.failures.pop(0):
            raise failure
        return Engine()

    async def ask(self, submitted_at: float) -> Engine | str:
        try:
            return await self.loader.engine(submitted_at)
        except LoadingFailed as error:
            return error.reason


def test_everybody_who_asked_before_a_try_failed_has_had_it() -> None:
    loading = Loading([OSError("no such folder"), OSError("still none"), None])

    async def ask() -> tuple[list[Any], Any, Any]:
        early = time.time()
        waiting = [asyncio.create_task(loading.ask(early)) for _ in range(20)]
        await asyncio.sleep(0)
        loading.go_on.set()
        first = await asyncio.gather(*waiting)
        first.append(await loading.ask(early))
        return first, await loading.ask(time.time()), await loading.ask(time.time())

    first, second, third = asyncio.run(ask())
    assert first == ["no such folder"] * 21
    assert second == "still none"
    assert isinstance(third, Engine)
    assert loading.tries == 3
    assert [report["state"] for report in loading.told] == [
        *["loading", "loading", "failed"] * 2,
        "loading",
        "loading",
        "ready",
    ]
    assert loading.told[1:3] == [
        {"state": "loading", "progress": 0.5},
        {"state": "failed", "reason": "no such folder"},
    ]


def test_who_leaves_does_not_stop_the_loading() -> None:
    loading = Loading([None])

    async def leave() -> Engine | str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loading.ask(time.time()), 0.01)
        loading.go_on.set()
        return await loading.ask(time.time())

    assert isinstance(asyncio.run(leave()), Engine)
    assert loading.tries == 1


def test_who_leaves_before_another_try_has_begun_does_not_call_it_off() -> None:
    loading = Loading([OSError("no"), None])
    loading.go_on.set()
    busy = threading.Event()

    async def leave() -> Engine | str:
        assert await loading.ask(0) == "no"
        loading.loader.thread.submit(busy.wait)
        leaving, staying = (asyncio.create_task(loading.ask(time.time())) for _ in range(2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.01)
        busy.set()
        return await staying

    assert isinstance(asyncio.run(leave()), Engine)


def test_what_was_loaded_when_loading_failed_is_let_go() -> None:
    class Weights:
        pass

    held: list[weakref.ref[Weights]] = []

    def load(_: Callable[[float], None]) -> Engine:
        weights = Weights()
        held.append(weakref.ref(weights))
        raise OSError("no")

    loader = Loader(load, cpu_threads=None, tell=lambda _: None)
    asyncio.run(loader.wait(lambda: False))
    gc.collect()
    assert held[0]() is None


@pytest.mark.parametrize("has_ready_sibling", [False, True])
def test_a_constructor_fails_only_where_another_replica_can_do_the_work(has_ready_sibling: bool) -> None:
    loading = Loading([OSError("no"), None])
    loading.go_on.set()
    if has_ready_sibling:
        with pytest.raises(LoadingFailed, match="no"):
            asyncio.run(loading.loader.wait(lambda: True))
    else:
        asyncio.run(loading.loader.wait(lambda: False))
        assert isinstance(asyncio.run(loading.ask(time.time())), Engine)


def test_a_replica_is_healthy_while_it_loads_or_has_failed_and_not_after_a_fault() -> None:
    loading = Loading([OSError("no"), None])
    loading.loader.check_health()
    loading.go_on.set()
    assert asyncio.run(loading.ask(0)) == "no"
    loading.loader.check_health()
    engine = asyncio.run(loading.ask(time.time()))
    assert isinstance(engine, Engine)
    loading.loader.check_health()
    engine.fault = EngineFault("the device is lost")
    with pytest.raises(EngineFault, match="the device is lost"):
        loading.loader.check_health()
