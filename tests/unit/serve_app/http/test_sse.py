"""Server-sent events of work that tells how it gets on."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.http import sse
from serve_app.http.sse import BEGUN, AllSent, Event, EventStream

Tell = Callable[[Any], None]


async def render(told: str) -> Event:
    return "told", {"text": told}


def render_error(error: Exception) -> Event:
    return "error", {"error": str(error)}


async def sent(work: Callable[[Tell, AllSent], Any], leave_after: int | None = None) -> list[bytes]:
    """The chunks of the body; the client leaves after so many of them."""
    stream: EventStream[str] = await EventStream.begin(work, render, render_error)
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


def test_what_is_told_is_sent_in_its_order() -> None:
    async def work(tell: Tell, _: AllSent) -> None:
        for item in (BEGUN, "one", "two\nlines"):
            tell(item)

    assert asyncio.run(sent(work)) == [
        b'event: told\ndata: {"text": "one"}\n\n',
        b'event: told\ndata: {"text": "two\\nlines"}\n\n',
    ]


def test_work_can_wait_until_all_is_sent() -> None:
    done: list[str] = []

    async def work(tell: Tell, all_sent: AllSent) -> None:
        tell(BEGUN)
        tell("one")
        tell("two")
        await all_sent()
        done.append("work")

    async def slowly(message: str) -> tuple[str, dict[str, Any]]:
        await asyncio.sleep(0.01)
        done.append(message)
        return "told", {"text": message}

    async def main() -> None:
        stream: EventStream[str] = await EventStream.begin(work, slowly, render_error)

        async def send(message: Any) -> None:
            if b"two" in message.get("body", b""):
                done.append("sent")

        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert done == ["one", "two", "sent", "work"]


def test_an_error_before_the_beginning_is_raised_and_one_after_it_is_the_last_event() -> None:
    async def early(_: Tell, __: AllSent) -> None:
        raise ValueError("early")

    async def late(tell: Tell, _: AllSent) -> None:
        tell(BEGUN)
        tell("one")
        raise ValueError("late")

    with pytest.raises(ValueError, match="early"):
        asyncio.run(sent(early))
    assert asyncio.run(sent(late))[-1] == b'event: error\ndata: {"error": "late"}\n\n'


def test_while_nothing_is_told_the_connection_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)

    async def work(tell: Tell, _: AllSent) -> None:
        tell(BEGUN)
        await asyncio.sleep(0.1)
        tell("one")

    *comments, last = asyncio.run(sent(work))
    assert len(comments) >= 2
    assert all(comment.startswith(b":") for comment in comments)
    assert b"one" in last


@pytest.mark.parametrize("leave_after", [0, 1])
def test_work_ends_when_the_client_leaves(leave_after: int) -> None:
    ended = []

    async def work(tell: Tell, _: AllSent) -> None:
        tell(BEGUN)
        tell("one")
        try:
            await asyncio.Future()
        finally:
            ended.append(True)

    async def leave() -> None:
        assert len(await asyncio.wait_for(sent(work, leave_after), 5)) <= 1
        assert ended

    asyncio.run(leave())
