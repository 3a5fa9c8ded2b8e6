"""Loads an engine, and retries on demand.

The replica's constructor must not raise, or Serve restarts it endlessly.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from deployments.errors import LoadingFailed, release
from deployments.observability import metrics
from deployments.observability.log import FAULT

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from deployments.scaling import Report

logger = logging.getLogger("ray.serve")

SPINS = "1000"
"""How often an idle thread of PyTorch looks for work before it sleeps.

A spinning thread occupies a CPU. By default it spins for milliseconds. With both stages on all CPUs, that
halved their speed.
"""


class AnyEngine(Protocol):
    """Attributes that all engines share; see `deployments.families`."""

    work: dict[str, int]

    @property
    def fault(self) -> Exception | None:
        """The fault that has stopped the engine, or None while it works."""


Engine = TypeVar("Engine", bound=AnyEngine)


class Loader(Generic[Engine]):
    """Loads a replica's engine in a thread, which later runs the engine. Starts at once.

    Args:
        load: loads the engine, in the thread. Its argument takes the share that is loaded, 0 to 1.
        cpu_threads: number of threads for PyTorch's CPU arithmetic; None keeps PyTorch's own number.
        report: takes a function that returns the replica's state. Called from any thread.

    Attributes:
        thread: executor of the one thread.
    """

    def __init__(
        self,
        load: Callable[[Callable[[float], None]], Engine],
        *,
        cpu_threads: int | None,
        report: Callable[[Callable[[], Report]], None],
    ) -> None:
        self._load = load
        self._cpu_threads = cpu_threads
        self._report = report
        self._failed_at = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._loading: Future[Engine] = self.thread.submit(self._try)

    async def wait(self, has_ready_sibling: Callable[[], bool]) -> None:
        """Returns when the first try has ended. Serve sends requests as soon as the constructor returns.

        If loading has failed, this returns all the same, so that requests get the reason. If another replica
        is ready, which can serve them, this raises, and Serve retries with growing delays.

        Args:
            has_ready_sibling: returns whether another replica is ready. Called in a thread; may block.

        Raises:
            LoadingFailed: this replica failed to load, and another one is ready.
        """
        try:
            await asyncio.wrap_future(self._loading)
        except LoadingFailed as error:
            if await asyncio.to_thread(has_ready_sibling):
                raise LoadingFailed(error.reason) from None

    async def engine(self, submitted_at: float) -> Engine:
        """Returns the engine as soon as it is loaded.

        Args:
            submitted_at: time of the request's submission, by `time.time`, which is assumed to agree on all
                nodes. A request from before the last failure shares that failure; a later one starts a retry.

        Raises:
            LoadingFailed: the engine cannot be loaded.
        """
        is_newer = submitted_at > self._failed_at or self._failed_at > time.time()  # the clock was set back
        if self._loading.done() and self._loading.exception() and is_newer:
            self._loading = self.thread.submit(self._try)
        try:  # the shield keeps a cancelled caller from cancelling the load
            return await asyncio.shield(asyncio.wrap_future(self._loading))
        except LoadingFailed as error:  # a new error for every caller: a shared one's traceback would grow
            raise LoadingFailed(error.reason) from None

    @property
    def has_failed(self) -> bool:
        """Whether the last try has failed, and no other one has begun."""
        loading = self._loading
        return loading.done() and loading.exception() is not None

    @property
    def loaded(self) -> Engine | None:
        """The engine if it is loaded, else None."""
        loading = self._loading  # a retry may replace it meanwhile
        return loading.result() if loading.done() and not loading.exception() else None

    def _try(self) -> Engine:
        self._report_progress(0)
        began = time.monotonic()
        try:
            if self._cpu_threads is not None:
                os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
                import torch  # here, so that importing the stages to wire them does not import torch

                torch.set_num_threads(self._cpu_threads)
            engine = self._load(self._report_progress)
        except Exception as error:  # noqa: BLE001 - all callers that wait must get it
            reason = LoadingFailed(str(error) or type(error).__name__).reason
            release(error, "loading failed", event="load", outcome="failed", reason=reason)
            _free_memory()
            self._failed_at = time.time()
            self._report(lambda: {"state": "failed", "reason": reason})
            metrics.LOADS.add(outcome="failed")
            raise LoadingFailed(reason) from None
        metrics.LOADS.add(outcome="loaded")
        seconds = time.monotonic() - began
        metrics.LOAD_SECONDS.observe(seconds)
        facts = {"event": "load", "outcome": "loaded", "seconds": round(seconds, 3)}
        logger.info("loaded in %.3f s", seconds, extra=facts)
        self._report(lambda: {"state": "ready", "done": next(iter(engine.work.values()))})
        return engine

    def _report_progress(self, share: float) -> None:
        self._report(lambda: {"state": "loading", "progress": round(share, 3)})


def _free_memory() -> None:
    """Frees what a failed load has left, so that the next one plans with all memory.

    If the GPU's context is lost, each further try in this process would fail. Then the process ends, and
    Serve starts another one.
    """
    gc.collect()  # pipelines have reference cycles
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return
    try:
        cuda.synchronize()  # a lost context raises the same error every time
    except RuntimeError as error:
        end_process(f"its GPU is lost: {error}")
    cuda.empty_cache()


def end_process(why: str) -> None:
    """Ends the process, so that Serve replaces the replica, and callers try another one."""
    logger.error("the process ends: %s", why, extra=FAULT)
    os._exit(1)
