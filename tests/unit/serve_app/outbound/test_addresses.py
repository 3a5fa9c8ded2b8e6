"""Addresses that clients may lead the server to, in every spelling, directly and by a redirect."""

import asyncio
import socket
import threading

import pytest
from pydantic import ValidationError

from serve_app.config import OutboundConfig
from serve_app.outbound import BAD_URL, NO_PUBLIC_ADDRESS, Outbound, OutboundError
from tests.unit.serve_app.outbound.server import (
    DATA,
    GOOD,
    PUBLIC,
    UNREACHABLE,
    Names,
    Server,
    outbound,
    redirect,
)

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


def test_a_url_has_a_bound(dialled: list[str]) -> None:
    outbound = Outbound(OutboundConfig())
    with pytest.raises(OutboundError, match="more than 8192 characters"):
        asyncio.run(outbound.fetch("http://example.com/" + "a" * 8192, max_bytes=1))
    assert not dialled


@pytest.mark.parametrize(
    ("url", "wording"),
    [(url, NO_PUBLIC_ADDRESS) for url in NOT_PUBLIC] + [(url, BAD_URL) for url in BAD_URLS],
)
def test_a_url_that_leads_inside_is_rejected_without_a_connection(
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


def test_an_entry_allows_one_host_as_written_and_one_port(names: Names) -> None:
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
def test_an_entry_that_would_allow_nothing_is_an_error(entry: str) -> None:
    with pytest.raises(ValidationError, match="allow"):
        OutboundConfig(allow=(entry,))


def test_silent_name_servers_delay_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
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
