"""The common part of our Ray Serve deployments: an engine, loaded in a thread, that answers requests."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from ray import serve

from deployments.errors import LoadingFailed, RequestTooLong
from deployments.observability import console, log, metrics, tracing
from deployments.stages.calls import stream
from deployments.stages.loading import Engine, Loader, end_process
from deployments.stages.reporting import Reporter
from deployments.types import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future

    from deployments.config import StageConfig
    from deployments.scaling import Report
    from deployments.stages.calls import Call
    from deployments.types import Event, StageRequest

Result = TypeVar("Result")
logger = logging.getLogger("ray.serve")


class Stage(Generic[Engine]):
    """One replica of a deployment. It starts to load its engine at once.

    Args:
        config: configuration of the stage.

    Attributes:
        part: name of the stage's work in metrics, traces and logs.
        loader: loads the engine.
    """

    part: ClassVar[str]

    async def __init__(self, config: StageConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        tracing.start(context.replica_tag)
        console.attach(context.deployment)
        self._device = config.device
        self._running = 0
        self._counted: dict[str, int] = {}
        self._reporter = Reporter()
        self.loader = Loader(self._load, cpu_threads=config.cpu_threads, report=self._reporter.report)
        self._reporter.measure = self._measure  # only now: it reads the loader
        await self.loader.wait(self._reporter.has_ready_sibling)

    def _load(self, report: Callable[[float], None]) -> Engine:
        """Loads the engine, in its thread.

        Args:
            report: takes the share that is loaded, 0 to 1.
        """
        raise NotImplementedError

    async def _answers(
        self, request: StageRequest, start: Callable[[Engine, Call], Future[Result]]
    ) -> AsyncGenerator[Event | Result, None]:
        """Yields the engine's events for a request, then its result; see `deployments.stages.calls.stream`.

        Args:
            request: the caller's request.
            start: submits the request to the engine and returns its future.
        """
        self._running += 1
        came = began = time.time()
        has_begun, outcome = False, "cancelled"
        item: Event | Result | None = None
        try:
            engine = await self.loader.engine(request.submitted_at)
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
            if isinstance(error, LoadingFailed):
                await self._end_process_if_another_is_ready(error)
            raise
        finally:
            self._running -= 1
            self._record_outcome(request, came, began, outcome, self._facts(item))
            self._end_process_after_fault()

    async def _end_process_if_another_is_ready(self, error: LoadingFailed) -> None:
        """Ends the process if the other replica became ready after this one failed to load.

        Otherwise it would fail all requests that it gets.
        """
        # If a retry has succeeded meanwhile, the replica that is ready is this one.
        if await asyncio.to_thread(self._reporter.has_ready_sibling) and self.loader.has_failed:
            end_process(f"another replica can serve its requests: {error}")

    def _end_process_after_fault(self) -> None:
        """Ends the process if its engine has a fault. Otherwise it would fail all further requests."""
        engine = self.loader.loaded
        if engine and engine.fault:
            end_process(f"its engine has a fault: {engine.fault}")

    def _facts(self, item: object) -> dict[str, int]:
        """Returns numbers for the log about the last item of an answer: the result, if there is one."""
        del item
        return {}

    def _record_outcome(
        self, request: StageRequest, came: float, began: float, outcome: str, facts: dict[str, int]
    ) -> None:
        """Logs and traces a finished request.

        Args:
            request: the request.
            came: time of its arrival, by `time.time`.
            began: time at which the engine began with it, by `time.time`.
            outcome: `made`, `cancelled`, or the name of the error's class.
            facts: numbers about its result.
        """
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
            **facts,
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

    def _measure(self) -> Report:
        """Updates the metrics; returns the replica's memory. The reporter's thread calls it repeatedly."""
        metrics.RUNNING.set(self._running)
        if engine := self.loader.loaded:
            for unit, done in engine.work.items():
                metrics.WORK.add(done - self._counted.get(unit, 0), unit=unit)
                self._counted[unit] = done
        return metrics.measure_memory(self._device)

    def __del__(self) -> None:
        """Cleans up. Serve calls this when it stops the replica."""
        if self.loader.loaded:
            metrics.UNLOADS.add()
            logger.info("unloaded", extra={"event": "unload"})
        self._reporter.leave()
        tracing.stop()
