"""What a caller of a stage and the thread that works for it share, and the way between the two."""

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


def _nobody(_: Event) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a stage, as its engine sees it.

    Attributes:
        request_id: of the request that it belongs to, for the log.
        report: takes what the caller may want to know meanwhile; from any thread, without waiting.
        cancelled: set when the caller has gone: the work is to stop.
    """

    request_id: str = ""
    report: Callable[[Event], None] = _nobody
    cancelled: threading.Event = field(default_factory=threading.Event)


async def stream(
    start: Callable[[Call], Future[Result]], request_id: str = ""
) -> AsyncGenerator[Event | Result, None]:
    """Do work in another thread; yields what it reports and, at last, its result.

    When the caller goes, the work is cancelled: at once if it has not begun, else it is told to stop and
    its end is waited for.

    Args:
        start: hands the work over and returns its future.
        request_id: of the request that it belongs to.
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
