"""Periodic tasks go on after errors: each kind of error once here, and each real task below."""

import asyncio
import logging
import selectors
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import ray.serve  # noqa: F401 - now, since it sets up the logger
from fsspec.implementations.local import LocalFileSystem
from ray.exceptions import ActorDiedError

from serve_app import background
from serve_app.background import Background, Periodic
from serve_app.cluster import lifecycle as lifecycle_module
from serve_app.cluster.lifecycle import Lifecycle
from serve_app.config import StorageConfig
from serve_app.errors import Unavailable
from serve_app.files.store import FileStore
from serve_app.observability import gauges, metrics
from serve_app.observability.gauges import Gauges


class Clock(selectors.DefaultSelector):
    """Time of an event loop that never sleeps: a pause is a step of the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen"
            self.now += timeout
        return ready


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock shows exactly the pauses of its tasks."""

    def __init__(self) -> None:
        self._clock = Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def in_fake_time(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


class Rounds:
    """A task that raises errors in some of its rounds. Notes the time of each round."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.times: list[float] = []
        self._outcomes = list(outcomes)

    async def run(self) -> None:
        self.times.append(asyncio.get_running_loop().time())
        if self._outcomes and (error := self._outcomes.pop(0)):
            raise error

    @property
    def pauses(self) -> list[float]:
        return [round(after - before, 3) for before, after in zip(self.times, self.times[1:], strict=False)]


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks whose failures were counted."""
    counted: list[str] = []
    monkeypatch.setattr(metrics.BACKGROUND_FAILURES, "add", lambda *, task: counted.append(task))
    return counted


BROKEN = RuntimeError("broken")


def test_a_task_runs_at_once_and_then_at_its_interval(failures: list[str]) -> None:
    rounds = Rounds()

    async def main() -> None:
        async with Background().run([Periodic(name="t", run=rounds.run, interval_s=2)]):
            await asyncio.sleep(5)

    in_fake_time(main())
    assert rounds.times == [0, 2, 4]
    assert failures == []


def test_a_task_that_raises_once_runs_again(caplog: pytest.LogCaptureFixture, failures: list[str]) -> None:
    rounds, tasks = Rounds(None, BROKEN, None), Background()

    async def main() -> None:
        async with tasks.run([Periodic(name="sweep", run=rounds.run, interval_s=2)]):
            await asyncio.sleep(7)
            assert tasks.failing == []

    in_fake_time(main())
    assert rounds.pauses == [2, 2, 2]
    assert failures == ["sweep"]
    (line,) = caplog.records
    assert line.getMessage() == "sweep failed and is tried again"
    assert line.levelname == "ERROR"
    assert vars(line)["event"] == "fault"
    assert line.exc_info
    assert line.exc_info[1] is BROKEN


def test_a_failing_task_stops_no_other_one(failures: list[str]) -> None:
    bad, good = Rounds(*[BROKEN] * 9), Rounds()

    async def main() -> None:
        tasks = [
            Periodic(name=name, run=rounds.run, interval_s=1) for name, rounds in (("b", bad), ("g", good))
        ]
        async with Background().run(tasks):
            await asyncio.sleep(5.5)

    in_fake_time(main())
    assert good.pauses == [1] * 5


def test_expected_errors_are_counted_and_not_logged(
    caplog: pytest.LogCaptureFixture, failures: list[str]
) -> None:
    rounds, tasks = Rounds(*[Unavailable("away")] * 3), Background()

    async def main() -> None:
        task = Periodic(name="t", run=rounds.run, interval_s=1, expected=(Unavailable,))
        async with tasks.run([task]):
            await asyncio.sleep(3.5)  # 0 s, 1 s, 3 s
            assert tasks.failing == ["t"]

    in_fake_time(main())
    assert caplog.records == []
    assert failures == ["t"] * 3


def test_a_task_is_failing_after_three_failures_in_a_row_and_until_a_success(failures: list[str]) -> None:
    rounds = Rounds(BROKEN, BROKEN, None, BROKEN, BROKEN, BROKEN, BROKEN, None)
    tasks, seen = Background(), []

    async def run() -> None:
        seen.append(list(tasks.failing))  # of the rounds before this one
        await rounds.run()

    async def main() -> None:
        assert tasks.failing == []
        async with tasks.run([Periodic(name="t", run=run, interval_s=0.1)]):
            await asyncio.sleep(3)

    in_fake_time(main())
    assert seen[:9] == [[], [], [], [], [], [], ["t"], ["t"], []]
    assert tasks.failing == []


def test_several_failing_tasks_are_listed_by_name(failures: list[str]) -> None:
    tasks = Background()

    async def main() -> None:
        names = {"b": Rounds(*[BROKEN] * 9), "a": Rounds(*[BROKEN] * 9), "fine": Rounds()}
        running = [Periodic(name=name, run=rounds.run, interval_s=0.1) for name, rounds in names.items()]
        async with tasks.run(running):
            await asyncio.sleep(3)
            assert tasks.failing == ["a", "b"]

    in_fake_time(main())


def test_the_pause_doubles_after_failures_up_to_a_bound(failures: list[str]) -> None:
    rounds = Rounds(*[BROKEN] * 40)

    async def main() -> None:
        async with Background().run([Periodic(name="t", run=rounds.run, interval_s=1)]):
            await asyncio.sleep(500)

    in_fake_time(main())
    assert background.MAX_BACKOFF_S == 5
    assert rounds.pauses[:40] == [1, 2, 4, *[5] * 36, 5]
    assert set(rounds.pauses[40:]) == {1}, "a success ends the longer pauses"


def test_an_interval_above_the_bound_is_kept_after_failures(failures: list[str]) -> None:
    rounds = Rounds(*[BROKEN] * 4)

    async def main() -> None:
        async with Background().run([Periodic(name="t", run=rounds.run, interval_s=60)]):
            await asyncio.sleep(400)

    in_fake_time(main())
    assert rounds.pauses == [60] * 6


def test_waking_starts_the_next_round_early(failures: list[str]) -> None:
    rounds = Rounds(None, BROKEN)

    async def main() -> None:
        wake = asyncio.Event()
        async with Background().run([Periodic(name="t", run=rounds.run, interval_s=10, wake=wake)]):
            await asyncio.sleep(3)
            wake.set()
            await asyncio.sleep(1)
            wake.set()  # after a failure too
            await asyncio.sleep(11)

    in_fake_time(main())
    assert rounds.times == [0, 3, 4, 14]


def test_a_change_during_a_round_starts_another_one_at_once(failures: list[str]) -> None:
    times: list[float] = []

    async def main() -> None:
        wake = asyncio.Event()

        async def run() -> None:
            times.append(asyncio.get_running_loop().time())
            await asyncio.sleep(1)
            if len(times) == 1:
                wake.set()

        async with Background().run([Periodic(name="t", run=run, interval_s=10, wake=wake)]):
            await asyncio.sleep(5)

    in_fake_time(main())
    assert times == [0, 1]


def test_the_end_of_the_block_ends_a_round_in_the_middle(failures: list[str]) -> None:
    ended: list[str] = []

    async def stuck() -> None:
        try:
            await asyncio.Future()
        finally:
            ended.append("round")

    async def main() -> None:
        async with Background().run([Periodic(name="t", run=stuck, interval_s=1)]):
            await asyncio.sleep(3)
        ended.append("block")

    in_fake_time(main())
    assert ended == ["round", "block"]
    assert failures == []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


def test_the_demand_is_reported_again_after_an_error(
    caplog: pytest.LogCaptureFixture, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle_module, "RENEWAL_S", 0.01)
    outcomes: list[Exception] = [RuntimeError("a fault"), ActorDiedError(), TimeoutError()]
    reports: list[tuple[Any, ...]] = []

    class Registry:
        async def ask(self, *report: Any) -> None:
            if outcomes:
                raise outcomes.pop(0)
            reports.append(report)

    class Running:
        def needed(self) -> list[str]:
            return ["m"]

    class Generator:
        running = Running()

    async def main() -> None:
        parts: Any = (Generator(), asyncio.Event(), Registry(), None)
        tasks = Background()
        async with tasks.run(Lifecycle(*parts).reporting):
            await until(lambda: len(reports) > 1)
            assert tasks.failing == []

    asyncio.run(main())
    assert len(failures) == 3
    assert len([line for line in caplog.records if line.levelno == logging.ERROR]) == 1, "two were expected"
    method, _, models = reports[0]
    assert (method, models) == ("need", ["m"])


def test_files_are_swept_again_after_an_error(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), ttl_s=1, max_bytes=0, min_free_bytes=0))
    find, outcomes = LocalFileSystem.find, [RuntimeError("botocore's own kind")]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if outcomes:
            raise outcomes.pop(0)
        return find(*args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "find", flaky)

    async def main() -> None:
        name = await store.save(b"data", "png")
        reaping = Periodic(name="delete old files", run=store.sweep, interval_s=store.sweep_interval_s)
        async with Background().run([reaping]):
            await until(lambda: not (tmp_path / name).exists())

    asyncio.run(main())
    assert failures == ["delete old files"]


def test_the_gauges_are_set_again_after_an_error(
    failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "INTERVAL_S", 0.01)
    outcomes: list[Exception] = [RuntimeError("a fault"), Unavailable("the database is away")]

    class Counts:
        queued, running, oldest_s = 3, 1, 2.5
        foreign = MappingProxyType({"glm_image-0": 2})

    class Store:
        async def counts(self, models: dict[str, str]) -> Counts:
            assert models == {}
            if outcomes:
                raise outcomes.pop(0)
            return Counts()

    class Generator:
        pending = 4

        def models(self) -> list[Any]:
            return []

    class Files:
        kept_bytes = None

    async def main() -> None:
        parts: Any = (Generator(), Store(), Files())
        updated = Gauges(*parts)
        updating = Periodic(name="update gauges", run=updated.update, interval_s=gauges.INTERVAL_S)
        async with Background().run([updating]):
            await until(lambda: updated.jobs_queued == 3)

    asyncio.run(main())
    assert failures == ["update gauges"] * 2
