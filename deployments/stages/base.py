"""What the replicas of all our Ray Serve deployments have in common: an engine that is loaded beside them."""

from __future__ import annotations

import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from ray import serve

from deployments.errors import RequestTooLong
from deployments.observability import log, metrics, tracing
from deployments.stages.calls import stream
from deployments.stages.loading import Engine, Loader, Replica
from deployments.types import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future

    from deployments.config import StageConfig
    from deployments.stages.calls import Call
    from deployments.types import Event, StageRequest

Result = TypeVar("Result")
logger = logging.getLogger("ray.serve")


class Stage(Generic[Engine]):
    """One replica; begins to load its engine at once.

    Args:
        config: where and how it runs.

    Attributes:
        part: of an image's making that it does, as metrics and traces call it.
    """

    part: ClassVar[str]

    async def __init__(self, config: StageConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        tracing.start(serve.get_replica_context().replica_tag)
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
        self, request: StageRequest, start: Callable[[Engine, Call], Future[Result]]
    ) -> AsyncGenerator[Event | Result, None]:
        """Yield the engine's events for a request, then its result; see `deployments.stages.calls.stream`.

        Args:
            request: the caller's.
            start: hands it to the engine.
        """
        self._running += 1
        came = began = time.time()
        has_begun, outcome = False, "cancelled"
        try:
            engine = await self._loader.engine(request.submitted_at)
            began = time.time()
            items = stream(lambda call: start(engine, call), request.request_id)
            async with aclosing(items):
                async for item in items:
                    if isinstance(item, Progress) and not has_begun:
                        has_begun, began = True, time.time() - item.seconds
                    yield item
            outcome = "made"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._running -= 1
            self._tell_end(request, came, began, outcome)

    def _tell_end(self, request: StageRequest, came: float, began: float, outcome: str) -> None:
        """Log and trace what became of a request: when it came, when the engine began, and how it ended."""
        ended = time.time()
        is_well = outcome in ("made", "cancelled", RequestTooLong.__name__)
        log.about(
            request.request_id,
            logging.INFO if is_well else logging.WARNING,
            f"{self.part} {outcome} in {ended - began:.3f} s",
            event="unit",
            outcome=outcome,
            waited_s=round(began - came, 3),
            seconds=round(ended - began, 3),
        )
        tracing.record(
            self.part,
            began,
            ended,
            kind="server",
            parent=request.traceparent,
            error="" if outcome in ("made", "cancelled") else outcome,
            cancelled=outcome == "cancelled",
        )

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
        logger.info("unloaded", extra={"event": "unload"})
        self._replica.leave()
        tracing.stop()
