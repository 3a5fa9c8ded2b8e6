"""Loading an engine, and loading it again: a constructor that failed Serve would restart, for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError

from deployments.errors import LoadingFailed, release
from deployments.observability import metrics
from deployments.scaling import ANSWER_S, RENEWAL_S, Report, find_gate

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ray.actor import ActorHandle

logger = logging.getLogger("ray.serve")

LEAST_S = 0.2
"""Between two reports: a component's tensors load by the thousand."""


class AnyEngine(Protocol):
    """What an engine of either kind has; see `deployments.families`."""

    fault: Exception | None
    done: int
    unit: str


Engine = TypeVar("Engine", bound=AnyEngine)


class Loader(Generic[Engine]):
    """Loads a replica's engine in a thread, which goes on to do its work; begins at once.

    Args:
        load: loads the engine, and tells the share of it, 0 to 1, that it has; run in the thread.
        cpu_threads: of PyTorch's arithmetic; None leaves it alone.
        tell: takes what tells how the replica is, from any thread.

    Attributes:
        thread: the one that loads.
    """

    def __init__(
        self,
        load: Callable[[Callable[[float], None]], Engine],
        *,
        cpu_threads: int | None,
        tell: Callable[[Callable[[], Report]], None],
    ) -> None:
        self._load = load
        self._cpu_threads = cpu_threads
        self._tell = tell
        self._failed_at = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._loading: Future[Engine] = self.thread.submit(self._try)

    async def wait(self, has_ready_sibling: Callable[[], bool]) -> None:
        """Return when the first try has ended: Serve sends requests as soon as the constructor returns.

        A constructor must not fail, so that requests learn why, unless there is another replica for them:
        then Serve goes on trying, ever more seldom.

        Raises:
            LoadingFailed: it has failed, and another replica has not.
        """
        try:
            await asyncio.wrap_future(self._loading)
        except LoadingFailed as error:
            if await asyncio.to_thread(has_ready_sibling):
                raise LoadingFailed(error.reason) from None

    async def engine(self, submitted_at: float) -> Engine:
        """The engine, as soon as it is there.

        Args:
            submitted_at: by `time.time`, which is taken to be the same on all nodes. Whoever asked before the
                last try failed has had that try; whoever asked later gets another one.

        Raises:
            LoadingFailed: it cannot be loaded.
        """
        if self._loading.done() and self._loading.exception() and submitted_at > self._failed_at:
            self._loading = self.thread.submit(self._try)
        try:  # whoever waits may leave; the loading goes on
            return await asyncio.shield(asyncio.wrap_future(self._loading))
        except LoadingFailed as error:  # a new one for everybody: a shared one's traceback would grow
            raise LoadingFailed(error.reason) from None

    @property
    def loaded(self) -> Engine | None:
        """The engine, if it is there."""
        if self._loading.done() and not self._loading.exception():
            return self._loading.result()
        return None

    def check_health(self) -> None:
        """Raises the engine's fault, if it has one."""
        if (engine := self.loaded) and (fault := engine.fault):
            raise fault

    def _try(self) -> Engine:
        self._tell_progress(0)
        began = time.monotonic()
        try:
            if self._cpu_threads is not None:
                import torch  # here, so that importing the stages to wire them loads none of it

                torch.set_num_threads(self._cpu_threads)
            engine = self._load(self._tell_progress)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are to know
            reason = LoadingFailed(str(error) or type(error).__name__).reason
            release(error, "loading failed", event="load", outcome="failed", reason=reason)
            self._failed_at = time.time()
            self._tell(lambda: {"state": "failed", "reason": reason})
            metrics.LOADS.add(outcome="failed")
            raise LoadingFailed(reason) from None
        metrics.LOADS.add(outcome="loaded")
        seconds = time.monotonic() - began
        metrics.LOAD_SECONDS.observe(seconds)
        facts = {"event": "load", "outcome": "loaded", "seconds": round(seconds, 3)}
        logger.info("loaded in %.3f s", seconds, extra=facts)
        self._tell(lambda: {"state": "ready", "done": engine.done})
        return engine

    def _tell_progress(self, share: float) -> None:
        self._tell(lambda: {"state": "loading", "progress": round(share, 3)})


class Replica:
    """A Serve replica of ours, as the gate knows it. Made in the replica.

    Attributes:
        measure: called every few seconds, by a thread of the replica's.
    """

    def __init__(self) -> None:
        self.measure: Callable[[], None] = lambda: None
        context = serve.get_replica_context()
        self._app_name = context.app_name
        self._id = (context.deployment, context.replica_tag)
        self._report: Callable[[], Report | None] = lambda: None
        self._changed = threading.Event()
        threading.Thread(target=self._go_on_telling, daemon=True).start()

    def tell(self, report: Callable[[], Report]) -> None:
        """Have the gate know how the replica is, now and again and again.

        May be called from any thread, often, and does not wait.
        """
        self._report = report
        self._changed.set()

    def has_ready_sibling(self) -> bool:
        """Whether another replica of the same stage is ready. Asks the gate, and waits for the answer."""
        with suppress(RayError):
            if gate := find_gate(self._app_name):
                reports: Any = ray.get(gate.reports.remote(), timeout=ANSWER_S)
                return any(report["state"] == "ready" for report in reports.get(self._id[0], []))
        return False

    def leave(self) -> None:
        """Have the gate forget the replica."""
        self._report = lambda: None
        self._changed.set()

    def _go_on_telling(self) -> None:
        gate: ActorHandle[Any] | None = None
        while True:
            self._changed.wait(RENEWAL_S)
            self._changed.clear()
            try:
                gate = gate or find_gate(self._app_name)
                if gate:
                    ray.get(gate.report.remote(*self._id, self._report()), timeout=ANSWER_S)
            except RayError:
                gate = None
            self.measure()
            time.sleep(LEAST_S)
