"""Fetching: redirects, types and sizes of answers, and answers that are broken, slow or endless."""

import asyncio
import gzip
import socket
from typing import Any

import aiohttp
import aiohttp.client_proto
import pytest
from aiohttp.http_parser import HttpResponseParserPy

from serve_app.outbound import MAX_REDIRECTS, OutboundError
from tests.unit.serve_app.outbound.server import (
    DATA,
    GOOD,
    UNREACHABLE,
    Answer,
    Server,
    answer,
    fetch,
    outbound,
    problem_of,
    redirect,
)


def test_a_request_has_only_the_necessary_headers() -> None:
    server = Server({"/a%20b?c=d%26e": GOOD})
    assert fetch(server, "/a b?c=d%26e#f") == DATA
    (head,) = server.heads
    assert sorted(head.rstrip().splitlines()) == [
        "Accept-Encoding: identity",
        "Accept: image/*",
        "GET /a%20b?c=d%26e HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        "User-Agent: glm-image-server",
    ]


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    server, proxy = Server({"/": GOOD}), Server()

    async def main() -> None:
        async with server.running() as base, proxy.running() as proxy_url:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy_url)
            assert await outbound(f"127.0.0.1:{server.port}").fetch(base + "/", max_bytes=10**6) == DATA

    asyncio.run(main())
    assert proxy.connections == 0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location", ["/a/c", "c", "../a/c", "//127.0.0.1:{port}/a/c", "http://127.0.0.1:{port}/a/c#d"]
)
def test_redirects_are_followed_and_cookies_are_not_kept(location: str, status: int) -> None:
    server = Server({"/a/c": GOOD})

    async def hop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = location.replace("{port}", str(server.port))
        writer.write(answer(b"x" * 9, f"{status} Elsewhere", Location=place, Set_Cookie="a=b"))

    server.answers["/a/b"] = hop
    assert fetch(server, "/a/b") == DATA
    assert "cookie" not in server.heads[1].lower()
    assert server.connections == 2


def test_five_redirects_are_followed_and_not_six() -> None:
    hops: dict[str, Answer] = {f"/{number}": redirect(str(number - 1)) for number in range(1, 7)}
    server = Server(hops | {"/0": GOOD})
    assert fetch(server, f"/{MAX_REDIRECTS}") == DATA
    assert problem_of(server, f"/{MAX_REDIRECTS + 1}") == "redirects more than 5 times"
    assert "/0" not in [head.split()[1] for head in server.heads[6:]]


def test_a_redirect_in_a_circle_ends() -> None:
    server = Server({"/": redirect("/")})
    assert problem_of(server) == "redirects more than 5 times"
    assert server.connections == 1 + MAX_REDIRECTS


@pytest.mark.parametrize(
    "status",
    [
        "204 No Content",
        "206 Partial Content",
        "304 Not Modified",
        "300 Multiple Choices",
        "404 Not Found",
        "500 Oops",
    ],
)
def test_any_status_but_200_is_an_error(status: str) -> None:
    server = Server({"/": answer(status=status, Location="/good"), "/good": GOOD})
    assert problem_of(server) == f"was answered with status {status[:3]}, not 200"
    assert server.connections == 1


def test_a_redirect_to_nowhere_is_an_error() -> None:
    assert problem_of(Server({"/": answer(status="302 Found")})) == "was answered with status 302, not 200"


@pytest.mark.parametrize(
    "kind",
    ["image/png", "binary/octet-stream", "application/force-download", "text/plain; a=b", "é", "", None],
)
def test_the_media_type_does_not_matter(kind: str | None) -> None:
    """Many hosts do not know it. The decoder looks at the file."""
    assert fetch(Server({"/": answer(DATA, Content_Type=kind)})) == DATA


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_an_encoded_body_is_rejected(encoding: str) -> None:
    server = Server({"/": answer(gzip.compress(DATA), Content_Encoding=encoding)})
    assert problem_of(server) == "has a Content-Encoding, which was not requested"


def test_a_body_is_not_decompressed_even_if_a_header_hides_its_encoding() -> None:
    bomb = gzip.compress(bytes(10**6))
    server = Server({"/": answer(bomb, Content_Encoding="identity\r\nContent-Encoding: gzip")})
    assert fetch(server, max_bytes=len(bomb)) == bomb


def test_the_limit_is_the_largest_allowed_size() -> None:
    server = Server({"/": GOOD})
    assert fetch(server, max_bytes=len(DATA)) == DATA
    assert problem_of(server, max_bytes=len(DATA) - 1) == f"has more than the {len(DATA) - 1} bytes allowed"


async def until_hung_up(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    assert await reader.read() == b""


def test_a_body_announced_as_too_large_is_not_awaited() -> None:
    async def promise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(Content_Length=10**12))
        await until_hung_up(reader, writer)

    assert problem_of(Server({"/": promise}), max_bytes=100) == "has more than the 100 bytes allowed"


@pytest.mark.parametrize("chunked", [True, False])
def test_an_endless_body_is_read_no_further_than_allowed(chunked: bool) -> None:
    sent = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(answer(Content_Length=None, **({"Transfer_Encoding": "chunked"} if chunked else {})))
        while True:
            writer.write(b"10000\r\n" + bytes(2**16) + b"\r\n" if chunked else bytes(2**16))
            await writer.drain()
            sent += 2**16

    assert problem_of(Server({"/": pour}), max_bytes=2**20) == "has more than the 1048576 bytes allowed"
    assert sent < 2**25  # what the buffers of two sockets may hold, and then some


async def drip_headers(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"HTTP/1.1 200 OK\r\n", b"A")


async def drip_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, answer(Content_Length=10**6), b"a")


async def drip_interim(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"", b"HTTP/1.1 102 Processing\r\n\r\n")


async def drip_redirects(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.1)  # each in time, and all together not
    writer.write(redirect("/"))
    await writer.drain()


async def drip(writer: asyncio.StreamWriter, start: bytes, drop: bytes) -> None:
    writer.write(start)
    while True:
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("slow", [until_hung_up, drip_headers, drip_body, drip_interim, drip_redirects])
def test_a_slow_server_is_given_up_in_time(slow: Answer) -> None:
    assert problem_of(Server({"/": slow}), timeout_s=0.3) == "took longer than 0.3 s"


def test_endless_headers_are_an_error_at_once() -> None:
    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"A: b\r\n" * 1000)
            await writer.drain()

    assert problem_of(Server({"/": pour})) == UNREACHABLE


BROKEN = {
    "nothing": b"",
    "noise": b"SSH-2.0-OpenSSH_9.9\r\n",
    "half": answer(b"abc", Content_Length=6),
    "half a chunk": answer(b"6\r\nabc", Content_Length=None, Transfer_Encoding="chunked"),
    "no length": answer(b"abc", Content_Length="x"),
    "a long header": answer(A="a" * 10**5),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_an_error(broken: bytes) -> None:
    assert problem_of(Server({"/": broken})) == UNREACHABLE


def test_a_broken_chunk_is_an_error_for_aiohttps_slower_parser_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", HttpResponseParserPy)
    begun, start = asyncio.Event(), aiohttp.ClientResponse.start

    async def observed(self: aiohttp.ClientResponse, connection: Any) -> aiohttp.ClientResponse:
        answer = await start(self, connection)
        begun.set()
        return answer

    monkeypatch.setattr(aiohttp.ClientResponse, "start", observed)

    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(Content_Length=None, Transfer_Encoding="chunked"))
        await begun.wait()
        writer.write(b"no chunk\r\n")
        await writer.drain()

    assert problem_of(Server({"/": break_off})) == UNREACHABLE


def test_a_port_without_a_server_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OutboundError, match=UNREACHABLE):
        asyncio.run(outbound(f"127.0.0.1:{port}").fetch(f"http://127.0.0.1:{port}/", max_bytes=1))
