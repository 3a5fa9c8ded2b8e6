"""Loading of an engine beside the event loop: its reports, its failures and its retries."""

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import LoadingFailed
from deployments.scaling import Report
from deployments.stages.loading import Loader


class Engine:
    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.work = {"steps": 0}


class Loading:
    """A loader whose tries end when `may_end` is set.

    Args:
        failures: outcome of each try: an error, or None for an engine.

    Attributes:
        tries: number of tries so far.
        reports: all reports so far.
    """

    def __init__(self, failures: list[Exception | None]) -> None:
        self.failures = failures
        self.tries = 0
        self.may_end = threading.Event()
        self.reports: list[Report] = []
        self.loader: Loader[Engine] = Loader(self._load, cpu_threads=None, report=self._report)

    def _report(self, state: Callable[[], Report]) -> None:
        self.reports.append(state())

    def _load(self, report: Callable[[float], None]) -> Engine:
        self.tries += 1
        report(0.5)
        assert self.may_end.wait(10)
        if failure := self.failures.pop(0):
            raise failure
        return Engine()

    async def ask(self, submitted_at: float) -> Engine | str:
        try:
            return await self.loader.engine(submitted_at)
        except LoadingFailed as error:
            return error.reason


def test_requests_from_before_a_failure_share_it_and_later_ones_retry() -> None:
    loading = Loading([OSError("no such folder"), OSError("still none"), None])

    async def ask() -> tuple[list[Any], Any, Any]:
        early = time.time()
        waiting = [asyncio.create_task(loading.ask(early)) for _ in range(20)]
        await asyncio.sleep(0)
        loading.may_end.set()
        first = await asyncio.gather(*waiting)
        first.append(await loading.ask(early))
        return first, await loading.ask(time.time()), await loading.ask(time.time())

    first, second, third = asyncio.run(ask())
    assert first == ["no such folder"] * 21
    assert second == "still none"
    assert isinstance(third, Engine)
    assert loading.tries == 3
    assert [report["state"] for report in loading.reports] == [
        *["loading", "loading", "failed"] * 2,
        "loading",
        "loading",
        "ready",
    ]
    assert loading.reports[1:3] == [
        {"state": "loading", "progress": 0.5},
        {"state": "failed", "reason": "no such folder"},
    ]


def test_a_cancelled_caller_does_not_stop_the_loading() -> None:
    loading = Loading([None])

    async def leave() -> Engine | str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loading.ask(time.time()), 0.01)
        loading.may_end.set()
        return await loading.ask(time.time())

    assert isinstance(asyncio.run(leave()), Engine)
    assert loading.tries == 1


def test_a_caller_cancelled_before_a_retry_begins_does_not_cancel_it() -> None:
    loading = Loading([OSError("no"), None])
    loading.may_end.set()
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


def test_a_failed_load_keeps_none_of_its_weights() -> None:
    class Weights:
        pass

    held: list[weakref.ref[Weights]] = []

    def load(_: Callable[[float], None]) -> Engine:
        weights = Weights()
        held.append(weakref.ref(weights))
        raise OSError("no")

    loader = Loader(load, cpu_threads=None, report=lambda _: None)
    asyncio.run(loader.wait(lambda: False))
    gc.collect()
    assert held[0]() is None


def test_a_failed_load_frees_cyclic_garbage_and_the_gpus_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        def __init__(self) -> None:
            self.cycle = self

    held: list[weakref.ref[Weights]] = []
    freed: list[bool] = []

    def load(_: Callable[[float], None]) -> Engine:
        held.append(weakref.ref(Weights()))
        raise OSError("no")

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        synchronize=lambda: None,
        empty_cache=lambda: freed.append(held[0]() is None),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    gc.disable()
    try:
        asyncio.run(Loader(load, cpu_threads=None, report=lambda _: None).wait(lambda: False))
    finally:
        gc.enable()
    assert freed == [True]


def test_a_process_whose_gpu_is_lost_while_it_loads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended: list[int] = []
    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=lost, empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(os, "_exit", ended.append)
    loading = Loading([RuntimeError("capture failed")])
    loading.may_end.set()
    asyncio.run(loading.loader.wait(lambda: False))
    assert ended == [1]


@pytest.mark.parametrize("has_ready_sibling", [False, True])
def test_a_constructor_raises_only_if_another_replica_is_ready(has_ready_sibling: bool) -> None:
    loading = Loading([OSError("no"), None])
    loading.may_end.set()
    if has_ready_sibling:
        with pytest.raises(LoadingFailed, match="no"):
            asyncio.run(loading.loader.wait(lambda: True))
    else:
        asyncio.run(loading.loader.wait(lambda: False))
        assert isinstance(asyncio.run(loading.ask(time.time())), Engine)


def test_a_load_is_tried_again_although_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = Loading([OSError("no"), None])
    loading.may_end.set()
    assert asyncio.run(loading.ask(time.time())) == "no"
    hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: hour_ago)
    assert isinstance(asyncio.run(loading.ask(hour_ago)), Engine)
