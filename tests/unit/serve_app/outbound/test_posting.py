"""Posting: the message, its one destination, and the answer."""

import asyncio

import pytest

from serve_app.outbound import OutboundError
from tests.unit.serve_app.outbound.server import DATA, GOOD, Server, answer, outbound, redirect


def test_a_message_is_posted_as_a_whole_and_its_answer_is_not_read() -> None:
    message = bytes(range(256)) * 2**13
    came: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.readexactly(len(message)))
        writer.write(answer(DATA * 1000, status="202 Accepted"))

    server = Server({"/hook?a=b": take})

    async def main() -> int:
        async with server.running() as base:
            door = outbound(f"127.0.0.1:{server.port}")
            await door.check(f"{base}/hook?a=b")
            assert server.connections == 0
            return await door.post(f"{base}/hook?a=b", message, {"X-Id": "7"})

    assert asyncio.run(main()) == 202
    assert came == [message]
    (head,) = server.heads
    assert head.startswith("POST /hook?a=b HTTP/1.1")
    assert "X-Id: 7" in head
    assert f"Host: 127.0.0.1:{server.port}" in head
    assert f"Content-Length: {len(message)}" in head


def test_a_message_is_posted_once_and_a_redirect_is_not_followed() -> None:
    server = Server({"/": redirect("/other"), "/other": GOOD})

    async def main() -> int:
        async with server.running() as base:
            return await outbound(f"127.0.0.1:{server.port}").post(base, b"x", {})

    assert asyncio.run(main()) == 302
    assert server.connections == 1


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_the_answer_to_a_question_is_read_up_to_a_limit(status: str) -> None:
    async def main(max_bytes: int) -> tuple[int, bytes]:
        server = Server({"/": answer(DATA, status)})
        async with server.running() as base:
            return await outbound(f"127.0.0.1:{server.port}").ask(base + "/", b"x", {}, max_bytes=max_bytes)

    assert asyncio.run(main(len(DATA))) == (int(status[:3]), DATA)
    with pytest.raises(OutboundError, match="has more than"):
        asyncio.run(main(len(DATA) - 1))
