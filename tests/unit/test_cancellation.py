"""Work in another thread leaves the event loop free, and stops when its caller is cancelled."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.cancellation import result_of


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def test_the_loop_goes_on_while_the_work_runs(thread: ThreadPoolExecutor) -> None:
    async def main() -> str:
        release = threading.Event()

        def work() -> str:
            assert release.wait(60)
            return "done"

        running = asyncio.create_task(result_of(lambda _: thread.submit(work)))
        await asyncio.sleep(0)
        release.set()  # by the loop: if the work blocked it, this line would not be reached
        return await running

    assert asyncio.run(main()) == "done"


def test_an_error_reaches_the_caller(thread: ThreadPoolExecutor) -> None:
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(result_of(lambda _: thread.submit(int, "broken")))


def test_a_cancelled_call_stops_the_work_and_waits_for_it(thread: ThreadPoolExecutor) -> None:
    async def main() -> list[str]:
        events: list[str] = []
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(cancelled: threading.Event) -> None:
            loop.call_soon_threadsafe(started.set)
            assert cancelled.wait(60)
            events.append("work stopped")
            raise RuntimeError

        running = asyncio.create_task(result_of(lambda cancelled: thread.submit(work, cancelled)))
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
