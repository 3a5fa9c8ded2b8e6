"""Work in another thread does not block the loop, reports its progress, and stops with its caller."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest

from deployments.stages.calls import Call, stream
from deployments.types import Progress


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


async def result_of(start: Callable[[Call], Future[Any]]) -> Any:
    """Returns the last item of the stream."""
    async with aclosing(stream(start)) as items:
        return [item async for item in items][-1]


def test_the_loop_runs_while_the_work_runs(thread: ThreadPoolExecutor) -> None:
    async def main() -> str:
        release = threading.Event()

        def work() -> str:
            assert release.wait(60)
            return "done"

        running = asyncio.create_task(result_of(lambda _: thread.submit(work)))
        await asyncio.sleep(0)
        release.set()  # by the loop; if the work blocked it, this line would not run
        result: str = await running
        return result

    assert asyncio.run(main()) == "done"


def test_an_error_reaches_the_caller(thread: ThreadPoolExecutor) -> None:
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(result_of(lambda _: thread.submit(int, "broken")))


def test_a_cancelled_call_stops_the_work_and_waits_for_it(thread: ThreadPoolExecutor) -> None:
    async def main() -> list[str]:
        events: list[str] = []
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(call: Call) -> None:
            loop.call_soon_threadsafe(started.set)
            assert call.cancelled.wait(60)
            events.append("work stopped")
            raise RuntimeError

        running = asyncio.create_task(result_of(lambda call: thread.submit(work, call)))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        events.append("call returned")
        return events

    assert asyncio.run(main()) == ["work stopped", "call returned"]


def test_work_whose_call_is_cancelled_in_the_queue_never_runs(thread: ThreadPoolExecutor) -> None:
    async def main() -> list[str]:
        ran: list[str] = []
        release = threading.Event()
        first = asyncio.create_task(result_of(lambda _: thread.submit(release.wait, 60)))
        second = asyncio.create_task(result_of(lambda _: thread.submit(ran.append, "second")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        release.set()
        assert await first
        await result_of(lambda _: thread.submit(ran.append, "third"))
        return ran

    assert asyncio.run(main()) == ["third"]


def test_the_reports_of_the_work_come_before_its_result(thread: ThreadPoolExecutor) -> None:
    reports = [Progress(done=i, total=3, seconds=0) for i in (1, 2, 3)]

    def work(call: Call) -> str:
        for report in reports:
            call.report(report)
        return "done"

    async def main() -> list[object]:
        return [item async for item in stream(lambda call: thread.submit(work, call))]

    assert asyncio.run(main()) == [*reports, "done"]


def test_a_caller_that_stops_iterating_stops_the_work(thread: ThreadPoolExecutor) -> None:
    stopped = threading.Event()

    def work(call: Call) -> None:
        call.report(Progress(done=1, total=2, seconds=0))
        assert call.cancelled.wait(60)
        stopped.set()

    async def main() -> None:
        async with aclosing(stream(lambda call: thread.submit(work, call))) as items:
            await anext(items)

    asyncio.run(main())
    assert stopped.is_set()
