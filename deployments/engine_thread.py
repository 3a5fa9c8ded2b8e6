"""The one thread of a replica that loads its engine and does all of its model work."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Engine = TypeVar("Engine")
Result = TypeVar("Result")


class EngineThread(Generic[Engine]):
    """Runs an engine's work in order, beside the replica's event loop and never on it.

    Args:
        load: makes the engine; called in the thread, while the constructor waits.
        cpu_threads: how many threads torch may use, or None to leave what the environment says.
    """

    def __init__(self, load: Callable[[], Engine], *, cpu_threads: int | None) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        if cpu_threads is not None:
            import torch  # here, so that importing the stages to wire them loads none of it

            torch.set_num_threads(cpu_threads)
        self._engine = self._executor.submit(load).result()

    async def run(self, work: Callable[[Engine, threading.Event], Result]) -> Result:
        """Await `work(engine, cancelled)`.

        When the caller is cancelled, so is the work: at once if it has not begun, else `cancelled` is
        set and waited for, so that a replica never counts as free while its device is not.
        """
        cancelled = threading.Event()
        job = self._executor.submit(work, self._engine, cancelled)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            cancelled.set()
            if not job.cancel():
                await asyncio.wait([done])
                done.exception()  # expected, and nobody else is left to look at it
            raise
