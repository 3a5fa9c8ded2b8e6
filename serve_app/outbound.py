"""Outgoing connections to addresses that clients or the configuration name as URLs.

Only the file store, the database and the exporter of traces have connections of their own.
"""

from __future__ import annotations

import asyncio
import io
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http import HttpProcessingError
from yarl import URL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from serve_app.config import OutboundConfig

MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
REDIRECTS = {301, 302, 303, 307, 308}

HOST = re.compile(r"[A-Za-z0-9._:-]+")
"""Names (encoded by IDNA) and addresses. No scope (`%eth0`), and no NUL, at which C would stop."""
HEADERS = {"User-Agent": "glm-image-server", "Accept-Encoding": "identity"}

NAT64 = ip_network("64:ff9b::/96")
"""Addresses of IPv4 hosts in IPv6-only networks: the last 32 bits are the IPv4 address."""
GLOBAL_UNICAST = ip_network("2000::/3")
"""Public IPv6 addresses. Mapped and compatible IPv4 and site-local addresses lie outside."""
NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            # Missing from `is_global` in some of the supported versions of Python.
            "192.0.0.0/24",  # IETF protocol assignments; Oracle's metadata service uses one
            "3fff::/20",  # documentation
            # 6to4: hardly any images are there, but it wraps IPv4 addresses.
            "192.88.99.0/24",
            "2002::/16",
            # The host of Azure's virtual machines.
            "168.63.129.16/32",
        ),
    )
)

BAD_URL = "must be an http or https URL without credentials, and so must every URL that it redirects to"
NO_PUBLIC_ADDRESS = "does not lead to a public address"
"""Problem of unknown names too, so that errors reveal nothing of the internal network."""


class OutboundError(Exception):
    """A URL cannot be reached, or must not be.

    Attributes:
        problem: continues a sentence that begins with the URL's name: "could not be reached". It reveals
            nothing of the internal network.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class Outbound:
    """Sends requests to public addresses, and to the entries of `allow`.

    A host is resolved once for each request and redirect. All its addresses are checked, and the first one is
    connected to. No connection and no cookie is kept.
    """

    def __init__(self, config: OutboundConfig) -> None:
        self._timeout_s = config.timeout_s
        self._allow = {_place(URL(f"http://{entry}")) for entry in config.allow}
        # Clients choose the name servers too. Slow ones occupy only these threads.
        self._lookups = ThreadPoolExecutor(thread_name_prefix="lookup")

    async def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """Fetches an image of at most `max_bytes` bytes, over at most 5 redirects.

        Raises:
            OutboundError: the URL or a redirect is not allowed; the answer has another status than 200, an
                encoding, or too many bytes; it is not valid HTTP; or it took longer than `timeout_s`.
        """
        target = _parse(url)
        async with self._in_time():
            for _ in range(1 + MAX_REDIRECTS):
                async with self._request("GET", target, HEADERS | {"Accept": "image/*"}) as answer:
                    location = answer.headers.get("Location")
                    if answer.status not in REDIRECTS or location is None:
                        return await _image(answer, max_bytes)
                    target = _redirected(target, location)
        raise OutboundError(f"redirects more than {MAX_REDIRECTS} times")

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Posts a message; returns the status of the answer. Its body is not read, a redirect not followed.

        Args:
            url: URL of the receiver.
            body: body of the message.
            headers: headers of the message. Values that a client chose have no line breaks.

        Raises:
            OutboundError: the URL is not allowed, or there was no answer within `timeout_s`.
        """
        target = _parse(url)
        async with self._in_time(), self._request("POST", target, {**HEADERS, **headers}, body) as answer:
            return answer.status

    async def ask(
        self, url: str, body: bytes, headers: Mapping[str, str], *, max_bytes: int
    ) -> tuple[int, bytes]:
        """Posts a request; returns the status and the body of the answer. The caller sets the time limit.

        Args:
            url: URL of the receiver; a redirect is not followed.
            body: body of the request.
            headers: headers of the request.
            max_bytes: most bytes of the answer.

        Raises:
            OutboundError: the URL is not allowed, or the answer is not valid or too large.
        """
        target = _parse(url)
        async with _plain_errors(), self._request("POST", target, {**HEADERS, **headers}, body) as answer:
            return answer.status, await _body(answer, max_bytes)

    async def check(self, url: str) -> None:
        """Checks that a URL is allowed.

        Raises:
            OutboundError: it is not.
        """
        target = _parse(url)
        async with self._in_time():
            await self._address(target)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                async with _plain_errors():
                    yield
        except TimeoutError as error:
            raise OutboundError(f"took longer than {self._timeout_s:g} s") from error

    @asynccontextmanager
    async def _request(
        self, method: str, url: URL, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # The address replaces the name, so that it is not resolved again. The server and TLS still get the
        # name, and TLS checks it.
        pinned = url.with_host(await self._address(url))
        async with (
            aiohttp.ClientSession(
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(),  # `_in_time` limits the whole
                trust_env=False,
            ) as session,
            session.request(
                method,
                pinned,
                headers={**headers, "Host": url.host_port_subcomponent or ""},
                data=body and io.BytesIO(body),  # aiohttp warns of large bytes
                allow_redirects=False,
                server_hostname=url.raw_host,
            ) as answer,
        ):
            yield answer

    async def _address(self, url: URL) -> str:
        host, port = _place(url)
        if not HOST.fullmatch(host):
            raise OutboundError(NO_PUBLIC_ADDRESS)
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)
        except (OSError, ValueError) as error:  # ValueError: a label is too long
            raise OutboundError(NO_PUBLIC_ADDRESS) from error
        addresses = [ip_address(socket_address[0]) for *_, socket_address in found]
        if (host, port) not in self._allow and not all(map(_is_public, addresses)):
            raise OutboundError(NO_PUBLIC_ADDRESS)
        return str(addresses[0])


@asynccontextmanager
async def _plain_errors() -> AsyncIterator[None]:
    """Turns the errors of a connection into `OutboundError`."""
    try:
        yield
    except TimeoutError:  # an OSError, for the caller
        raise
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        raise OutboundError("could not be reached, or gave no valid answer") from error


def _parse(text: str, base: URL | None = None) -> URL:
    if len(text) > MAX_URL_CHARS:  # yarl caches what it has parsed
        raise OutboundError(f"has more than {MAX_URL_CHARS} characters")
    try:
        url = URL(text) if base is None else base.join(URL(text))
    except ValueError as error:
        raise OutboundError(BAD_URL) from error
    if url.scheme not in ("http", "https") or not all(_place(url)) or url.user or url.password:
        raise OutboundError(BAD_URL)
    return url


def _redirected(url: URL, location: str) -> URL:
    target = _parse(location, url)
    if url.scheme == "https" and target.scheme == "http":
        raise OutboundError("redirects from https to http")
    return target


def _place(url: URL) -> tuple[str, int]:
    """Returns the host, in lower case and encoded by IDNA, and the port; empty or 0 if missing."""
    return url.raw_host or "", url.port or 0


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if address in NAT64:
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in NOT_PUBLIC)
    )


async def _image(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if answer.status != 200:
        raise OutboundError(f"was answered with status {answer.status}, not 200")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise OutboundError("has a Content-Encoding, which was not requested")
    return await _body(answer, max_bytes)


async def _body(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    too_large = f"has more than the {max_bytes} bytes allowed"
    if (answer.content_length or 0) > max_bytes:
        raise OutboundError(too_large)
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise OutboundError(too_large)
    return bytes(body)
