"""Answers that tell how the work gets on: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 15.0
"""Proxies cut connections on which nothing comes for a minute or so."""

Item = TypeVar("Item")
Event = tuple[str, dict[str, Any]]
"""Its name and its data."""
AllSent = Callable[[], Coroutine[Any, Any, None]]
"""Waits until all that was told is sent."""


class _Begun:
    """Told by the work when nothing can be wrong with the request any more."""


BEGUN = _Begun()


class EventStream(StreamingResponse, Generic[Item]):
    """Does work and sends an event for everything it tells. The work ends with the connection.

    Make it by `begin`.
    """

    def __init__(
        self,
        working: asyncio.Task[None],
        told: asyncio.Queue[Item | _Begun | None],
        render: Callable[[Item], Awaitable[Event]],
        render_error: Callable[[Exception], Event],
    ) -> None:
        super().__init__(
            self._events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._working = working
        self._told = told
        self._render = render
        self._render_error = render_error

    @classmethod
    async def begin(
        cls,
        work: Callable[[Callable[[Item | _Begun], None], AllSent], Coroutine[Any, Any, None]],
        render: Callable[[Item], Awaitable[Event]],
        render_error: Callable[[Exception], Event],
    ) -> EventStream[Item]:
        """Start the work; returns when it has told `BEGUN`. What it raises before is raised here.

        Args:
            work: is given the function by which it tells, and one by which it can wait until all is sent.
            render: the event for what was told.
            render_error: the last event, for what the work raised.
        """
        told: asyncio.Queue[Item | _Begun | None] = asyncio.Queue()
        working = asyncio.create_task(work(told.put_nowait, told.join))
        working.add_done_callback(lambda _: told.put_nowait(None))
        try:
            if await told.get() is None:
                await working
            told.task_done()
            return cls(working, told, render, render_error)
        except BaseException:
            working.cancel()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the work has ended or the client has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._working.cancel()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    item = await self._told.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if item is None:
                break
            if not isinstance(item, _Begun):
                yield _encoded(await self._render(item))
            self._told.task_done()
        if error := self._working.exception():
            if not isinstance(error, Exception):
                raise error
            yield _encoded(self._render_error(error))


def _encoded(event: Event) -> bytes:
    name, data = event
    return format_sse_event(event=name, data_str=json.dumps(data))
