"""A TCP proxy that can close its connections or stop forwarding, like a failing network."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Line:
    """A proxy to a port on this machine.

    Attributes:
        port: port of the proxy.
    """

    port = 0

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._ends: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._flows = asyncio.Event()
        self._flows.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the proxy within the block."""
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        server = self._run(asyncio.start_server(self._connect, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            self.cut()
            self.mend()
            self._run(self._all_ended())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def cut(self) -> None:
        """Closes all connections, and rejects new ones."""
        self._is_cut = True

        async def end() -> None:
            for writer in self._ends:
                writer.transport.abort()

        self._run(end())

    def silence(self) -> None:
        """Stops forwarding, and keeps the connections open."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def mend(self) -> None:
        """Accepts connections and forwards again, including delayed data."""
        self._is_cut = False
        self._loop.call_soon_threadsafe(self._flows.set)

    async def _all_ended(self) -> None:
        while self._ends:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        pair = {writer, to_server}
        self._ends |= pair
        await asyncio.gather(self._pass(reader, to_server), self._pass(from_server, writer))
        self._ends -= pair

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()
