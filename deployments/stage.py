"""What the replicas of all our Ray Serve deployments have in common: an engine that is loaded beside them."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Generic, TypeVar

from deployments import metrics
from deployments.calls import stream
from deployments.loading import Engine, Loader, Replica

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future

    from deployments.calls import Call
    from deployments.config import StageConfig
    from deployments.types import Event

Result = TypeVar("Result")


class Stage(Generic[Engine]):
    """One replica; begins to load its engine at once.

    Args:
        config: where and how it runs.
    """

    async def __init__(self, config: StageConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._device = config.device
        self._running = self._told_done = 0
        self._replica = Replica()
        self._loader = Loader(self._load, cpu_threads=config.cpu_threads, tell=self._replica.tell)
        self._replica.measure = self._measure  # not before there is a loader to ask
        await self._loader.wait(self._replica.has_ready_sibling)

    def _load(self, report: Callable[[float], None]) -> Engine:
        """Load the engine, in its thread; `report` is told the share of it that is loaded, 0 to 1."""
        raise NotImplementedError

    async def _answers(
        self, asked_at: float, start: Callable[[Engine, Call], Future[Result]]
    ) -> AsyncGenerator[Event | Result, None]:
        """What the engine tells of a request and, at last, makes of it; see `deployments.calls.stream`.

        Args:
            asked_at: see `Loader.engine`.
            start: hands the request to the engine.
        """
        self._running += 1
        try:
            engine = await self._loader.engine(asked_at)
            items = stream(lambda call: start(engine, call))
            async with aclosing(items):
                async for item in items:
                    yield item
        finally:
            self._running -= 1

    def _measure(self) -> None:
        """Tell the metrics how the replica is; called every few seconds, by a thread."""
        metrics.RUNNING.set(self._running)
        metrics.tell_memory(self._device)
        if engine := self._loader.loaded:
            done = engine.done
            metrics.WORK.add(done - self._told_done, unit=engine.unit)
            self._told_done = done

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        self._loader.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica is to go."""
        metrics.UNLOADS.add()
        self._replica.leave()
