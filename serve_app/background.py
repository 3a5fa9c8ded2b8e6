"""Tasks in the background. A periodic one that fails is logged, retried, and shown in `/health`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.observability.log import FAULT
from serve_app.errors import RequestError
from serve_app.observability import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable

logger = logging.getLogger("ray.serve")

MAX_BACKOFF_S = 5.0
FAILING_AFTER = 3
"""Failures in a row from which a task counts as failing."""

Result = TypeVar("Result")

_calls: set[asyncio.Task[Any]] = set()
"""Calls of `to_its_end`. An event loop may forget a task that nobody refers to."""


async def to_its_end(call: Coroutine[Any, Any, Result]) -> Result:
    """Returns a call's result. The call runs to its end even if this one is cancelled.

    Use it where a client that hangs up would otherwise leave something half done.
    """
    task = asyncio.create_task(call)
    _calls.add(task)
    task.add_done_callback(_calls.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_report)
        raise


def _report(task: asyncio.Task[Any]) -> None:
    """Logs the unexpected error of a call, which nobody else learns of any more."""
    error = None if task.cancelled() else task.exception()
    if error and not isinstance(error, RequestError):
        logger.error("a call failed after its client had hung up", exc_info=error, extra=FAULT)


async def end_calls(timeout_s: float) -> None:
    """Waits for the calls of `to_its_end` in this event loop, before the server stops."""
    loop = asyncio.get_running_loop()
    if calls := [task for task in _calls if task.get_loop() is loop]:
        await asyncio.wait(calls, timeout=timeout_s)


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """A periodic task.

    Attributes:
        name: its name in the log, in `/health` and in the metric.
        run: runs it once.
        interval_s: seconds between two runs. After failures, a pause below `MAX_BACKOFF_S` doubles, up to it.
        wake: starts the next run early when it is set.
        expected: errors that are not logged here: another part logs them, or they are usual for a while.
    """

    name: str
    run: Callable[[], Awaitable[object]]
    interval_s: float
    wake: asyncio.Event | None = None
    expected: tuple[type[Exception], ...] = ()


class Background:
    """Runs periodic tasks, and knows which of them keep failing."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}

    @property
    def failing(self) -> list[str]:
        """Names of the tasks that have failed several times in a row."""
        return sorted(name for name, failures in self._failures.items() if failures >= FAILING_AFTER)

    @asynccontextmanager
    async def run(self, tasks: Iterable[Periodic]) -> AsyncIterator[None]:
        """Runs the tasks within the block."""
        started = self.start(tasks)
        try:
            yield
        finally:
            await self.stop(started)

    def start(self, tasks: Iterable[Periodic]) -> list[asyncio.Task[None]]:
        """Starts the tasks; `stop` ends them."""
        return [asyncio.create_task(self._repeat(task)) for task in tasks]

    async def stop(self, started: Iterable[asyncio.Task[None]]) -> None:
        """Ends started tasks, in the middle of a run if need be."""
        tasks = list(started)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(self, task: Periodic) -> None:
        failures = 0
        while True:
            if task.wake:
                task.wake.clear()
            try:
                await task.run()
                failures = 0
            except task.expected:
                failures += 1
            except Exception:
                failures += 1
                logger.exception("%s failed and is tried again", task.name, extra=FAULT)
            self._failures[task.name] = failures
            if failures:
                metrics.BACKGROUND_FAILURES.add(task=task.name)
            backoff_s = task.interval_s * 2 ** min(max(failures - 1, 0), 10)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(backoff_s, max(task.interval_s, MAX_BACKOFF_S))):
                    await (task.wake or asyncio.Event()).wait()
