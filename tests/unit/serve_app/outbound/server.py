"""A server, and clients of it that use `Outbound`."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from serve_app.config import OutboundConfig
from serve_app.outbound import Outbound, OutboundError

DATA = bytes(range(256)) * 10
PUBLIC = "93.184.216.34"
"""A public address, which no test reaches."""
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
    """Answers by path, and counts connections and requests. As a canary it should get none."""

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
                for _ in range(5):  # a new connection has its task within four turns of the loop
                    await asyncio.sleep(0)
                async with asyncio.timeout(20):  # until all clients have hung up
                    await asyncio.gather(*self._tasks)
                self._tasks.clear()


def outbound(*allow: str, timeout_s: float = 20) -> Outbound:
    return Outbound(OutboundConfig(allow=allow, timeout_s=timeout_s))


def fetch(server: Server, path: str = "/", *, max_bytes: int = 10**6, timeout_s: float = 20) -> bytes:
    """Fetches from a server that `allow` names."""

    async def main() -> bytes:
        async with server.running() as base:
            door = outbound(f"127.0.0.1:{server.port}", timeout_s=timeout_s)
            return await door.fetch(base + path, max_bytes=max_bytes)

    return asyncio.run(main())


def problem_of(server: Server, path: str = "/", *, max_bytes: int = 10**6, timeout_s: float = 20) -> str:
    with pytest.raises(OutboundError) as caught:
        fetch(server, path, max_bytes=max_bytes, timeout_s=timeout_s)
    assert str(caught.value) == caught.value.problem
    return caught.value.problem


@dataclass
class Names:
    """Name servers. Each name has the addresses of one look-up after the other."""

    addresses: dict[str, list[list[str]]] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)
