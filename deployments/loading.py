"""Loading an engine beside a replica's event loop: Serve would restart a constructor that fails, for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ray import serve

from deployments.errors import LoadingFailed
from deployments.scaling import RENEWAL_S, Report, find_gate

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ray.actor import ActorHandle

logger = logging.getLogger("ray.serve")


class Faulty(Protocol):
    """What an engine of either kind has."""

    fault: Exception | None


Engine = TypeVar("Engine", bound=Faulty)


class Loader(Generic[Engine]):
    """Loads a replica's engine in a thread, which goes on to do its work; begins at once.

    Args:
        load: loads the engine, and tells the share of it, 0 to 1, that it has; run in the thread.
        cpu_threads: of PyTorch's arithmetic; None leaves it alone.
        tell: takes how the replica is, from any thread.

    Attributes:
        thread: the one that loads.
    """

    def __init__(
        self,
        load: Callable[[Callable[[float], None]], Engine],
        *,
        cpu_threads: int | None,
        tell: Callable[[Report], None],
    ) -> None:
        self._load = load
        self._cpu_threads = cpu_threads
        self._tell = tell
        self._telling = threading.Lock()  # so that nothing older is told later
        self._failed_at = 0.0
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._report: Report = {}
        self._loading: Future[Engine] = self.thread.submit(self._try)

    async def engine(self, asked_at: float) -> Engine:
        """The engine, as soon as it is there.

        Args:
            asked_at: on the clock of `time.time`. Whoever asked before the last try failed has had that try;
                whoever asks later gets another one.

        Raises:
            LoadingFailed: it cannot be loaded.
        """
        if self._loading.done() and self._loading.exception() and asked_at > self._failed_at:
            self._loading = self.thread.submit(self._try)
        try:  # whoever waits may leave; the loading goes on
            return await asyncio.shield(asyncio.wrap_future(self._loading))
        except LoadingFailed as error:  # a new one for everybody: a shared one's traceback would grow
            raise LoadingFailed(error.reason) from None

    def check_health(self) -> None:
        """Tell again how the replica is; raises the engine's fault."""
        with self._telling:
            self._tell(self._report)
        if self._loading.done() and not self._loading.exception() and (fault := self._loading.result().fault):
            raise fault

    def _try(self) -> Engine:
        self._told(state="loading", progress=0.0)
        try:
            if self._cpu_threads is not None:
                import torch  # here, so that importing the stages to wire them loads none of it

                torch.set_num_threads(self._cpu_threads)
            engine = self._load(lambda share: self._told(state="loading", progress=round(share, 3)))
        except Exception as error:
            reason = str(error) or type(error).__name__
            logger.exception("loading failed")
            self._failed_at = time.time()
            self._told(state="failed", reason=reason)
            raise LoadingFailed(reason) from None  # whose frames would hold what was loaded
        self._told(state="ready")
        return engine

    def _told(self, **report: Any) -> None:
        with self._telling:
            self._report = report
            self._tell(report)


class Replica:
    """A Serve replica of ours, as the gate knows it. Made in the replica."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self._app_name = context.app_name
        self._id = (context.deployment, context.replica_tag)
        self._gate: ActorHandle[Any] | None = None
        self._told = ("", float("-inf"))

    def tell(self, report: Report) -> None:
        """Report to the gate: changes of state at once, the rest once a second at most."""
        state, at = self._told
        now = time.monotonic()
        if report["state"] == state and now - at < RENEWAL_S / 2:
            return
        self._gate = self._gate or find_gate(self._app_name)
        if self._gate:
            self._told = (report["state"], now)
            self._gate.report.remote(*self._id, report)

    def leave(self) -> None:
        """Have the gate forget it."""
        if self._gate:
            self._gate.report.remote(*self._id, None)
