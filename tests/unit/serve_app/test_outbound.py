"""The way out: what a user may lead the server to, by whatever spelling, and what may come back."""

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiohttp.client_proto
import aiohttp.connector
import pytest
from aiohttp.http_parser import HttpResponseParserPy
from pydantic import ValidationError

import serve_app.outbound
from serve_app.config import OutboundConfig
from serve_app.outbound import BAD_URL, MAX_REDIRECTS, NO_PUBLIC_ADDRESS, Outbound, OutboundError

DATA = bytes(range(256)) * 10
PUBLIC = "93.184.216.34"
UNREACHABLE = "could not be reached, or gave no valid answer"

Answer = bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"", /, status: str = "200 OK", **headers: object) -> bytes:
    fields = {"Content_Length": len(body)} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status=status, Location=location)


GOOD = answer(DATA, Content_Type="image/png")


@dataclass
class Server:
    """Answers by path, and counts what comes: a canary, where nothing should."""

    answers: dict[str, Answer] = field(default_factory=dict)
    port: int = 0
    connections: int = 0
    heads: list[str] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if task := asyncio.current_task():
            self._tasks.add(task)
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
            self.heads.append(head)
            given = self.answers[head.split()[1]]
            if isinstance(given, bytes):
                writer.write(given)
                await writer.drain()
            else:
                await given(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            try:
                yield f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
            finally:
                for _ in range(5):  # turns of the loop: who has just dialled has a task within four
                    await asyncio.sleep(0)
                async with asyncio.timeout(20):  # until all have hung up
                    await asyncio.gather(*self._tasks)
                self._tasks.clear()


def outbound(*allow: str, timeout_s: float = 20) -> Outbound:
    return Outbound(OutboundConfig(allow=allow, timeout_s=timeout_s))


def fetch(server: Server, path: str = "/", *, max_bytes: int = 10**6, timeout_s: float = 20) -> bytes:
    """Have a server that is allowed asked for something."""

    async def main() -> bytes:
        async with server.running() as base:
            door = outbound(f"127.0.0.1:{server.port}", timeout_s=timeout_s)
            return await door.fetch(base + path, max_bytes=max_bytes)

    return asyncio.run(main())


def problem(server: Server, path: str = "/", *, max_bytes: int = 10**6, timeout_s: float = 20) -> str:
    with pytest.raises(OutboundError) as caught:
        fetch(server, path, max_bytes=max_bytes, timeout_s=timeout_s)
    assert str(caught.value) == caught.value.problem
    return caught.value.problem


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses, other than this machine's, to which a connection was to be opened; none is."""
    dialled: list[str] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not ip_address(address[0]).is_loopback:
            dialled.append(address[0])
            raise ConnectionRefusedError
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return dialled


@dataclass
class Names:
    """Name servers: each name has addresses for one look-up after the other."""

    addresses: dict[str, list[list[str]]] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        if host not in names.addresses:  # an address then, in whatever spelling
            return list(look_up(host, port, flags=socket.AI_NUMERICHOST, **options))
        names.lookups.append(host)
        addresses = names.addresses[host].pop(0)
        return [look_up(address, port, **options)[0] for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "127.0.0.1.": ["127.0.0.1"],
    "loopback.test": ["127.0.0.1"],
    "last.test": [PUBLIC, "127.0.0.1"],
    "first.test": ["127.0.0.1", PUBLIC],
    "six.test": [PUBLIC, "::1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "xn--bcher-kva.test": ["10.0.0.1"],
}
NOT_PUBLIC = [
    # Loopback, by all its names
    "http://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "http://127.255.255.254:{port}/",
    "http://LOCALHOST:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    # ... and spellings
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0X7F.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127。0。0。1:{port}/",
    "http://127．0．0．1:{port}/",
    "http://１２７.０.０.１:{port}/",
    "http://①②⑦.0.0.1:{port}/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/",
    "http://127%2e0%2e0%2e1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1\0.example.com:{port}/",
    "http://1.1.1.1\0.example.com/",
    "http://127.0.0.1%20:{port}/",
    "http://\t127.0.\n0.1:{port}/",
    " http://127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/",
    # Private, shared, link-local and special addresses
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://169.254.170.2/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://192.0.2.1/",
    "http://192.88.99.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fc00::1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[2606:4700::1111%25lo]/",
    "http://[2606:4700::1111%251]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[ff0e::1]/",
    "http://[100::1]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[4000::1]/",
    "http://[5f00::1]/",
    # IPv4 in IPv6
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::127.0.0.1]:{port}/",
    "http://[::10.0.0.1]/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b::168.63.129.16]/",
    "http://[64:ff9b::224.0.0.1]/",
    "http://[64:ff9b:1::10.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001:0:808:808::80ff:fefe]/",
    # Names with such an address, or none
    *(f"http://{name}:{{port}}/" for name in NAMES),
    "http://BÜCHER.test:{port}/",
    "http://a..b/",
    "http://.localhost:{port}/",
    "http://" + "a" * 64 + ".test/",
    "http://nowhere.test/",
]
BAD_URLS = [
    "",
    "/",
    "127.0.0.1:{port}",
    "//127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http:///",
    "http://:{port}/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:65536/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:x/",
    "http://[::1/",
    "http://[127.0.0.1]x:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://user:secret@127.0.0.1:{port}/",
    "http://:secret@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://example.com\\@127.0.0.1:{port}/",
    "http://\ud800/",
    "ftp://127.0.0.1:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_x",
    "data:image/png;base64,AAAA",
    "ws://127.0.0.1:{port}/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "javascript:alert(1)",
]


@pytest.mark.parametrize(
    ("url", "wording"),
    [(url, NO_PUBLIC_ADDRESS) for url in NOT_PUBLIC] + [(url, BAD_URL) for url in BAD_URLS],
)
def test_a_url_that_leads_inside_is_refused_before_anything_is_dialled(
    url: str, wording: str, names: Names, dialled: list[str]
) -> None:
    names.addresses = {name: [addresses] * 3 for name, addresses in NAMES.items()}
    canary = Server({"/": GOOD})

    async def main() -> None:
        async with canary.running():
            target, door = url.replace("{port}", str(canary.port)), outbound()
            for using in (
                door.fetch(target, max_bytes=10**6),
                door.post(target, DATA, {}),
                door.check(target),
            ):
                with pytest.raises(OutboundError) as caught:
                    await using
                assert caught.value.problem == wording

    asyncio.run(main())
    assert canary.connections == 0
    assert dialled == []


# A header holds no control characters, and what has no host leads back to where it is found.
REDIRECTED = [
    url for url in NOT_PUBLIC + BAD_URLS if url.isprintable() and "://" in url and url != "http:///"
]


@pytest.mark.parametrize("url", [*REDIRECTED, "data:image/png;base64,AAAA", "//[::1]:{port}/"])
def test_a_redirect_is_checked_like_a_url(url: str, names: Names, dialled: list[str]) -> None:
    names.addresses = {name: [addresses] for name, addresses in NAMES.items()}
    canary = Server({"/": GOOD})

    async def main() -> None:
        server = Server()
        async with canary.running(), server.running() as base:
            server.answers["/"] = redirect(url.replace("{port}", str(canary.port)))
            with pytest.raises(OutboundError) as caught:
                await outbound(f"127.0.0.1:{server.port}").fetch(base + "/", max_bytes=10**6)
            assert caught.value.problem == (BAD_URL if url in BAD_URLS else NO_PUBLIC_ADDRESS)
            assert server.connections == 1

    asyncio.run(main())
    assert canary.connections == 0
    assert dialled == []


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "192.0.1.1", "2606:4700::1111", "64:ff9b::808:808", "3ffe::1"]
)
def test_public_addresses_are_dialled(address: str, dialled: list[str]) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(OutboundError, match="could not be reached"):
        asyncio.run(outbound().fetch(f"http://{host}:8080/", max_bytes=1))
    assert dialled == [address]


def test_one_look_up_decides_and_one_address_is_dialled(names: Names, dialled: list[str]) -> None:
    names.addresses["changing.test"] = [[PUBLIC, "1.1.1.1"], ["127.0.0.1"]]
    canary = Server({"/": GOOD})

    async def main() -> None:
        async with canary.running():
            with pytest.raises(OutboundError, match="could not be reached"):
                await outbound().fetch(f"http://changing.test:{canary.port}/", max_bytes=10**6)

    asyncio.run(main())
    assert dialled == [PUBLIC]
    assert names.lookups == ["changing.test"]
    assert canary.connections == 0


def test_each_redirect_is_looked_up_anew(names: Names) -> None:
    names.addresses["changing.test"] = [["127.0.0.1"], ["127.0.0.1"]]
    server = Server({"/b": GOOD})

    async def main() -> None:
        async with server.running():
            server.answers["/a"] = redirect(f"http://changing.test:{server.port}/b")
            door = outbound(f"changing.test:{server.port}")
            assert await door.fetch(f"http://changing.test:{server.port}/a", max_bytes=10**6) == DATA

    asyncio.run(main())
    assert names.lookups == ["changing.test"] * 2
    assert all(f"\r\nHost: changing.test:{server.port}\r\n" in head for head in server.heads)


def test_what_is_allowed_is_one_host_as_it_is_written_and_one_port(names: Names) -> None:
    names.addresses = {"inside.test": [["127.0.0.1"]] * 3, "localhost": [["127.0.0.1"]]}
    server, canary = Server({"/": GOOD}), Server({"/": GOOD})

    async def main() -> None:
        async with server.running(), canary.running():
            port = server.port
            door = outbound(f"Inside.test:{port}", f"127.0.0.1:{port}")
            for host in ("inside.test", "INSIDE.TEST", "127.0.0.1"):
                assert await door.fetch(f"http://{host}:{port}/", max_bytes=10**6) == DATA
            for url in (f"localhost:{port}", f"127.1:{port}", f"127.0.0.1:{canary.port}", "127.0.0.1"):
                with pytest.raises(OutboundError, match=NO_PUBLIC_ADDRESS):
                    await door.fetch(f"http://{url}/", max_bytes=10**6)

    asyncio.run(main())
    assert (server.connections, canary.connections) == (3, 0)


def test_an_allowed_address_of_ipv6_may_be_written_in_any_way() -> None:
    with pytest.raises(OutboundError, match=UNREACHABLE):
        asyncio.run(outbound("[0:0::1]:9").fetch("http://[::1]:9/", max_bytes=1))


@pytest.mark.parametrize(
    "entry", ["h", "h:0", "h:", ":80", "http://h:80", "u@h:80", "h:80/", "::1:80", "h:8x"]
)
def test_an_entry_that_would_allow_nothing_is_a_mistake(entry: str) -> None:
    with pytest.raises(ValidationError, match="allow"):
        OutboundConfig(allow=(entry,))


def test_the_request_tells_what_it_must_and_no_more() -> None:
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


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert problem(server, f"/{MAX_REDIRECTS + 1}") == "redirects more than 5 times"
    assert "/0" not in [head.split()[1] for head in server.heads[6:]]


def test_a_redirect_in_a_circle_ends() -> None:
    server = Server({"/": redirect("/")})
    assert problem(server) == "redirects more than 5 times"
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
    assert problem(server) == f"was answered with status {status[:3]}, not 200"
    assert server.connections == 1


def test_a_redirect_to_nowhere_is_an_error() -> None:
    assert problem(Server({"/": answer(status="302 Found")})) == "was answered with status 302, not 200"


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/JPEG; a=b", "application/octet-stream", "", None])
def test_images_are_taken_and_what_nothing_is_said_of(kind: str | None) -> None:
    assert fetch(Server({"/": answer(DATA, Content_Type=kind)})) == DATA


@pytest.mark.parametrize(
    "kind", ["text/html", "application/json", "imagex/png", "text/plain; image/png", "é"]
)
def test_other_types_are_refused(kind: str) -> None:
    assert problem(Server({"/": answer(DATA, Content_Type=kind)})) == "is not an image by its Content-Type"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_what_is_encoded_is_refused(encoding: str) -> None:
    server = Server({"/": answer(gzip.compress(DATA), Content_Encoding=encoding)})
    assert problem(server) == "comes with a Content-Encoding, which was not asked for"


def test_nothing_is_decompressed_even_if_it_is_hidden_that_it_could_be() -> None:
    bomb = gzip.compress(bytes(10**6))
    server = Server({"/": answer(bomb, Content_Encoding="identity\r\nContent-Encoding: gzip")})
    assert fetch(server, max_bytes=len(bomb)) == bomb


def test_the_limit_is_the_largest_size() -> None:
    server = Server({"/": GOOD})
    assert fetch(server, max_bytes=len(DATA)) == DATA
    assert problem(server, max_bytes=len(DATA) - 1) == f"has more than the {len(DATA) - 1} bytes allowed"


async def until_hung_up(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    assert await reader.read() == b""


def test_what_says_that_it_is_too_large_is_not_waited_for() -> None:
    async def promise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(Content_Length=10**12))
        await until_hung_up(reader, writer)

    assert problem(Server({"/": promise}), max_bytes=100) == "has more than the 100 bytes allowed"


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_without_end_is_read_no_further_than_allowed(chunked: bool) -> None:
    sent = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(answer(Content_Length=None, **({"Transfer_Encoding": "chunked"} if chunked else {})))
        while True:
            writer.write(b"10000\r\n" + bytes(2**16) + b"\r\n" if chunked else bytes(2**16))
            await writer.drain()
            sent += 2**16

    assert problem(Server({"/": pour}), max_bytes=2**20) == "has more than the 1048576 bytes allowed"
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
def test_nobody_is_waited_for_longer_than_allowed(slow: Answer) -> None:
    assert problem(Server({"/": slow}), timeout_s=0.3) == "took longer than 0.3 s"


def test_headers_without_end_are_an_error_at_once() -> None:
    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"A: b\r\n" * 1000)
            await writer.drain()

    assert problem(Server({"/": pour})) == UNREACHABLE


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
    assert problem(Server({"/": broken})) == UNREACHABLE


def test_a_broken_chunk_is_an_error_for_aiohttps_slower_parser_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiohttp.client_proto, "HttpResponseParser", HttpResponseParserPy)
    begun, image = asyncio.Event(), serve_app.outbound._image

    async def observed(given: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        begun.set()
        return await image(given, max_bytes)

    monkeypatch.setattr(serve_app.outbound, "_image", observed)

    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(Content_Length=None, Transfer_Encoding="chunked"))
        await begun.wait()
        writer.write(b"no chunk\r\n")
        await writer.drain()

    assert problem(Server({"/": break_off})) == UNREACHABLE


def test_where_nothing_listens_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OutboundError, match=UNREACHABLE):
        asyncio.run(outbound(f"127.0.0.1:{port}").fetch(f"http://127.0.0.1:{port}/", max_bytes=1))


def test_a_message_is_posted_whole_and_its_answer_not_read() -> None:
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


def test_a_message_is_posted_once_and_to_no_other_place() -> None:
    server = Server({"/": redirect("/other"), "/other": GOOD})

    async def main() -> int:
        async with server.running() as base:
            return await outbound(f"127.0.0.1:{server.port}").post(base, b"x", {})

    assert asyncio.run(main()) == 302
    assert server.connections == 1


def test_name_servers_that_do_not_answer_hold_up_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def never(*_: object, **__: object) -> None:
        released.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", never)

    async def main() -> None:
        door = outbound(timeout_s=0.3)
        fetches = [door.fetch(f"http://name{number}.test/", max_bytes=1) for number in range(40)]
        for result in await asyncio.gather(*fetches, return_exceptions=True):
            assert str(result) == "took longer than 0.3 s"
        async with asyncio.timeout(20):
            assert await asyncio.to_thread(lambda: "done") == "done"

    try:
        asyncio.run(main())
    finally:
        released.set()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of right.test, signed by itself, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl (Debian: apt-get install openssl)")
    file = tmp_path_factory.mktemp("tls") / "right.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=right.test"
    )
    extension = ["-addext", "subjectAltName=DNS:right.test"]
    subprocess.run(
        [*command.split(), *extension, "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@dataclass
class Secure:
    """A server with the certificate, under right.test and wrong.test."""

    server: Server
    tls: ssl.SSLContext
    told: list[str | None]

    def fetch(self, host: str, path: str = "/") -> bytes:
        async def main() -> bytes:
            async with self.server.running(self.tls):
                port = self.server.port
                door = outbound(f"right.test:{port}", f"wrong.test:{port}", "right.test:80")
                return await door.fetch(f"https://{host}:{port}{path}", max_bytes=10**6)

        return asyncio.run(main())


@pytest.fixture
def secure(certificate: Path, names: Names) -> Secure:
    names.addresses = {
        name: [["127.0.0.1"], ["127.0.0.1"]] for name in ("right.test", "wrong.test", "right.test.")
    }
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    secure = Secure(Server({"/": GOOD}), tls, [])
    tls.sni_callback = lambda _, name, __: secure.told.append(name)
    return secure


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever signed the certificate is trusted, as if it came with the system."""
    context = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", context)


@pytest.mark.usefixtures("trusted")
def test_tls_is_told_the_name_and_checks_it(secure: Secure) -> None:
    assert secure.fetch("right.test") == DATA
    with pytest.raises(OutboundError, match=UNREACHABLE):
        secure.fetch("wrong.test")
    assert secure.told == ["right.test", "wrong.test"]
    assert len(secure.server.heads) == 1


def test_tls_checks_who_signed(secure: Secure) -> None:
    with pytest.raises(OutboundError, match=UNREACHABLE):
        secure.fetch("right.test")
    assert secure.server.heads == []


@pytest.mark.usefixtures("trusted")
def test_a_redirect_does_not_leave_tls(secure: Secure, names: Names) -> None:
    secure.server.answers |= {"/a": redirect("/"), "/b": redirect("http://right.test/")}
    assert secure.fetch("right.test", "/a") == DATA
    names.addresses["right.test"] = [["127.0.0.1"]]
    with pytest.raises(OutboundError, match="redirects from https to http"):
        secure.fetch("right.test", "/b")
