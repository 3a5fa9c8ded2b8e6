"""From a cancelled coroutine to work that stops."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

Result = TypeVar("Result")


async def result_of(start: Callable[[threading.Event], Future[Result]]) -> Result:
    """Await work that another thread does.

    When the caller is cancelled, so is the work: at once if it has not begun, else the event it was started
    with is set and its end waited for, so that a replica never counts as free while its device is not.

    Args:
        start: hands the work over, with the event that it is to look at, and returns its future.
    """
    cancelled = threading.Event()
    work = start(cancelled)
    done = asyncio.wrap_future(work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        cancelled.set()
        if not work.cancel():
            await asyncio.wait([done])
            done.exception()  # expected, and nobody else is left to look at it
        raise
