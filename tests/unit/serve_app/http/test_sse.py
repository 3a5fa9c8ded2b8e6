"""Server-sent events: their order, their errors, and the end of the work behind them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from serve_app.http import sse
from serve_app.http.sse import EventStream, SSEEvent

AllSent = Callable[[], Awaitable[None]]
Events = AsyncGenerator[SSEEvent | None, None]


def event(text: str, *, is_last: bool = False) -> SSEEvent:
    return SSEEvent(name="said", data=json.dumps({"text": text}), is_last=is_last)


async def sent(events: Callable[[AllSent], Events], leave_after: int | None = None) -> list[bytes]:
    """Returns the chunks of the body. The client leaves after some of them, if a number is given."""
    stream = await EventStream.begin(events)
    chunks: list[bytes] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            chunks.append(message["body"])
        if leave_after is not None and len(chunks) >= leave_after:
            gone.set()

    await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    await asyncio.sleep(0)
    return chunks


def test_events_are_sent_in_their_order() -> None:
    async def events(all_sent: AllSent) -> Events:
        yield None
        yield event("one")
        yield event("two\nlines")

    assert asyncio.run(sent(events)) == [
        b'event: said\ndata: {"text": "one"}\n\n',
        b'event: said\ndata: {"text": "two\\nlines"}\n\n',
    ]


def test_the_last_event_is_in_the_last_message_and_nothing_follows_it() -> None:
    messages: list[Any] = []
    cleaned_up: list[bool] = []

    async def events(all_sent: AllSent) -> Events:
        yield None
        yield event("one")
        yield event("two", is_last=True)
        await all_sent()
        await asyncio.sleep(0.01)
        cleaned_up.append(True)

    async def main() -> None:
        stream = await EventStream.begin(events)

        async def receive() -> dict[str, Any]:
            while not (messages and not messages[-1].get("more_body", True)):  # noqa: ASYNC110
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}  # servers say so when an answer is whole

        async def send(message: Any) -> None:
            messages.append(message)

        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        assert cleaned_up, "the generator was not cancelled"

    asyncio.run(main())
    start, one, two = messages
    assert (start["status"], one["more_body"], two["more_body"]) == (200, True, False)
    assert b"two" in two["body"]


def test_a_fault_after_the_last_event_is_raised() -> None:
    async def events(all_sent: AllSent) -> Events:
        yield None
        yield event("one", is_last=True)
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        asyncio.run(sent(events))


def test_the_answer_begins_when_the_request_is_accepted() -> None:
    order: list[str] = []

    async def events(all_sent: AllSent) -> Events:
        await asyncio.sleep(0.01)
        order.append("accepted")
        yield None
        yield event("one")

    async def main() -> None:
        stream = await EventStream.begin(events)
        order.append("begun")

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                order.append("answered")

        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert order == ["accepted", "begun", "answered"]


def test_work_can_wait_until_all_is_sent() -> None:
    order: list[str] = []

    async def events(all_sent: AllSent) -> Events:
        yield None
        yield event("one")
        yield event("two")
        order.append("made")
        await all_sent()
        order.append("released")

    async def main() -> None:
        stream = await EventStream.begin(events)

        async def send(message: Any) -> None:
            await asyncio.sleep(0.01)
            order.extend(text for text in ("one", "two") if text.encode() in message.get("body", b""))

        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert order == ["made", "one", "two", "released"]


def test_a_client_gets_everything_if_the_work_no_longer_waits_for_it() -> None:
    chunks: list[bytes | None] = []

    async def main() -> None:
        has_ended = asyncio.Event()

        async def events(all_sent: AllSent) -> Events:
            yield None
            yield event("one")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await all_sent()
            has_ended.set()

        async def send(message: Any) -> None:
            await has_ended.wait()
            chunks.append(message.get("body"))

        stream = await EventStream.begin(events)
        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert chunks == [None, b'event: said\ndata: {"text": "one"}\n\n', b""]


def test_an_error_before_the_acceptance_is_raised_at_once() -> None:
    async def events(all_sent: AllSent) -> Events:
        raise ValueError("early")
        yield

    with pytest.raises(ValueError, match="early"):
        asyncio.run(sent(events))


def test_a_later_error_breaks_the_answer_after_the_events_before_it() -> None:
    chunks: list[bytes] = []

    async def events(all_sent: AllSent) -> Events:
        yield None
        yield event("one")
        raise ValueError("late")

    async def main() -> None:
        stream = await EventStream.begin(events)

        async def send(message: Any) -> None:
            if message.get("body"):
                chunks.append(message["body"])

        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="late"):
        asyncio.run(main())
    assert chunks == [b'event: said\ndata: {"text": "one"}\n\n']


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)

    async def events(all_sent: AllSent) -> Events:
        yield None
        await asyncio.sleep(0.1)
        yield event("one")

    *comments, last = asyncio.run(sent(events))
    assert len(comments) >= 2
    assert all(comment.startswith(b":") for comment in comments)
    assert b"one" in last


@pytest.mark.parametrize("leave_after", [0, 1])
def test_work_ends_when_the_client_leaves(leave_after: int) -> None:
    ended = []

    async def events(all_sent: AllSent) -> Events:
        try:
            yield None
            yield event("one")
            await asyncio.Future()
        finally:
            ended.append(True)

    async def leave() -> None:
        assert len(await asyncio.wait_for(sent(events, leave_after), 5)) <= 1
        assert ended

    asyncio.run(leave())


def test_work_ends_when_the_client_leaves_before_the_answer_begins() -> None:
    ended = []

    async def events(all_sent: AllSent) -> Events:
        try:
            await asyncio.Future()
            yield None
        finally:
            ended.append(True)

    async def leave() -> None:
        beginning = asyncio.create_task(EventStream.begin(events))
        await asyncio.sleep(0.01)
        beginning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beginning
        await asyncio.sleep(0)
        assert ended

    asyncio.run(leave())
