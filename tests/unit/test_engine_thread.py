"""Model work runs beside the event loop, in order, and can be called off."""

import asyncio
import threading

import pytest

from deployments.engine_thread import EngineThread


@pytest.fixture
def thread() -> EngineThread[str]:
    return EngineThread(lambda: "engine", cpu_threads=None)


def test_the_loop_goes_on_while_the_engine_works(thread: EngineThread[str]) -> None:
    async def main() -> str:
        release = threading.Event()

        def work(engine: str, cancelled: threading.Event) -> str:
            assert release.wait(60)
            return engine

        running = asyncio.create_task(thread.run(work))
        await asyncio.sleep(0)
        release.set()  # by the loop: if the work blocked it, this line would not be reached
        return await running

    assert asyncio.run(main()) == "engine"


def test_an_error_reaches_the_caller_and_the_next_work_runs(thread: EngineThread[str]) -> None:
    async def main() -> str:
        with pytest.raises(ValueError, match="broken"):
            await thread.run(lambda *_: int("broken"))
        return await thread.run(lambda engine, _: engine)

    assert asyncio.run(main()) == "engine"


def test_a_cancelled_call_stops_the_work_and_waits_for_it(thread: EngineThread[str]) -> None:
    async def main() -> list[str]:
        events: list[str] = []
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(_: str, cancelled: threading.Event) -> None:
            loop.call_soon_threadsafe(started.set)
            assert cancelled.wait(60)
            events.append("work stopped")
            raise RuntimeError

        running = asyncio.create_task(thread.run(work))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        events.append("call returned")
        return events

    assert asyncio.run(main()) == ["work stopped", "call returned"]


def test_a_call_cancelled_in_the_queue_never_runs(thread: EngineThread[str]) -> None:
    async def main() -> list[str]:
        ran: list[str] = []
        release = threading.Event()
        first = asyncio.create_task(thread.run(lambda *_: release.wait(60)))
        second = asyncio.create_task(thread.run(lambda *_: ran.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        release.set()
        assert await first
        await thread.run(lambda *_: ran.append("third"))
        return ran

    assert asyncio.run(main()) == ["third"]


def test_a_failing_load_fails_the_constructor() -> None:
    with pytest.raises(ValueError, match="broken"):
        EngineThread(lambda: int("broken"), cpu_threads=None)
