"""The connection between the caller of a stage and the thread that works for it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from concurrent.futures import Future

    from deployments.types import Event

Result = TypeVar("Result")


def _ignore(_: Event) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a stage, as its engine sees it.

    Attributes:
        request_id: id of the client's request, for the log.
        report: takes the engine's events. May be called from any thread; does not block.
        cancelled: set when the caller is gone. The work must then stop.
    """

    request_id: str = ""
    report: Callable[[Event], None] = _ignore
    cancelled: threading.Event = field(default_factory=threading.Event)


async def stream(
    start: Callable[[Call], Future[Result]], request_id: str = ""
) -> AsyncGenerator[Event | Result, None]:
    """Runs work in another thread, and yields its events and then its result.

    When the caller stops iterating, the work is cancelled. Work that has not begun is removed at once. Work
    that has begun is asked to stop, and this generator waits for its end.

    Args:
        start: submits the work and returns its future.
        request_id: id of the client's request, for the log.
    """
    loop = asyncio.get_running_loop()
    reported: asyncio.Queue[Event | None] = asyncio.Queue()

    def report(event: Event | None) -> None:
        loop.call_soon_threadsafe(reported.put_nowait, event)

    call = Call(request_id=request_id, report=report)
    work = start(call)
    work.add_done_callback(lambda _: report(None))
    try:
        while (event := await reported.get()) is not None:
            yield event
        yield work.result()
    finally:
        if not work.done() and not work.cancel():
            call.cancelled.set()
            while await reported.get() is not None:
                pass
