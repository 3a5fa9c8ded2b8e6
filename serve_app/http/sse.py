"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a comment is sent. Proxies close silent connections after a minute or so."""
_TEXT = {"type": "string"}
DOCUMENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The events.",
        "content": {
            "text/event-stream": {
                "itemSchema": {"type": "object", "properties": dict.fromkeys(("event", "id", "data"), _TEXT)}
            }
        },
    }
}
"""A stream of events for the OpenAPI document: https://spec.openapis.org/oas/v3.2.0#server-sent-events."""


@dataclass(frozen=True, kw_only=True)
class SSEEvent:
    """An event.

    Attributes:
        data: its data, as JSON.
        name: its name; None for the default, `message`.
        id: its id, which a client sends when it reconnects.
        is_last: whether the stream ends with it.
    """

    data: str
    name: str | None = None
    id: str | None = None
    is_last: bool = False


class _End:
    """Follows the last item of a stream."""


_END = _End()


class EventStream(StreamingResponse):
    """Sends the events of a generator. The generator ends with the connection. Create it with `begin`."""

    def __init__(self, items: asyncio.Queue[SSEEvent | _End | None], pump: asyncio.Task[None]) -> None:
        super().__init__(
            self._chunks(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._items = items
        self._pump = pump
        self._is_last = self._is_over = False

    @classmethod
    async def begin(
        cls, generate: Callable[[Callable[[], Awaitable[None]]], AsyncGenerator[SSEEvent | None, None]]
    ) -> EventStream:
        """Starts a generator in a task of its own; returns when it has accepted the request.

        Args:
            generate: takes a function that waits until all events so far are sent; returns the generator.
                The generator yields None as soon as it has accepted the request, then the events. An error
                before that is raised here.
        """
        items: asyncio.Queue[SSEEvent | _End | None] = asyncio.Queue()
        events = generate(items.join)

        async def run() -> None:
            async with aclosing(events):
                async for event in events:
                    items.put_nowait(event)

        pump = asyncio.create_task(run())
        pump.add_done_callback(lambda _: items.put_nowait(_END))
        try:
            if isinstance(await items.get(), _End):
                pump.result()
                items.put_nowait(_END)  # a generator without items has an empty stream
            items.task_done()
            return cls(items, pump)
        except BaseException:
            pump.cancel()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until the generator has ended or the client has disconnected."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._is_over:  # the client may hang up while the generator cleans up
                await asyncio.wait([self._pump])
            else:
                self._pump.cancel()

    async def stream_response(self, send: Send) -> None:
        """Sends the events. The message with the last one is the answer's last.

        So the answer is whole even if its client hangs up as soon as it has that event.
        """
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.body_iterator:
            await send({"type": "http.response.body", "body": chunk, "more_body": not self._is_last})
        if not self._is_last:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        while not self._is_last:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    item = await self._items.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if isinstance(item, _End):
                break
            if item is not None:
                self._is_last = item.is_last
                yield format_sse_event(event=item.name, id=item.id, data_str=item.data)
            self._items.task_done()
        self._is_over = True
        await asyncio.wait([self._pump])
        self._pump.result()
