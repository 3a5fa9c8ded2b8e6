"""A server between a client and the real one, which loses answers and connections on purpose."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.http.conftest import Endpoint


@dataclass(frozen=True)
class Relayed:
    """A request, and the IDs of the events in its answer that were passed on."""

    method: str
    path: str
    headers: dict[str, str]
    sent: list[str]


class Relay:
    """Passes requests on, except that it loses some answers.

    - The answer to the first POST is lost.
    - The connection of the first stream of events breaks after one event.
    - The second stream ends after one event, as when a server stops.

    Attributes:
        url: base URL.
        relayed: requests so far.
    """

    def __init__(self, server: Endpoint) -> None:
        self.relayed: list[Relayed] = []
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                relayed = Relayed(self.command, self.path, dict(self.headers), [])
                relay.relayed.append(relayed)
                upstream = HTTPConnection(*server.address)
                headers = {**self.headers, "Connection": "close"}
                upstream.request(self.command, self.path, body or None, headers)
                answer = upstream.getresponse()
                self.close_connection = True
                if len(relay.posts) > 1 or self.command != "POST":
                    self._pass_on(answer, relayed)
                upstream.close()

            def do_POST(self) -> None:
                self.do_GET()

            def _pass_on(self, answer: HTTPResponse, relayed: Relayed) -> None:
                is_stream = relayed in relay.streams
                will_break = is_stream and len(relay.streams) == 1
                self.send_response_only(answer.status)
                for name in ("Content-Type", "Location"):
                    if value := answer.headers[name]:
                        self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                if not will_break:  # Node takes a break for the end of the answer if the header was sent
                    self.send_header("Connection", "close")
                self.end_headers()
                if is_stream:
                    self._pass_on_events(answer, relayed, is_short=len(relay.streams) <= 2)
                else:
                    self._chunk(answer.read())
                if will_break:
                    time.sleep(0.1)  # else the client's system may drop what has been sent
                    linger = struct.pack("ii", 1, 0)  # closing resets the connection
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    os.close(self.connection.detach())
                else:
                    self._chunk(b"")

            def _pass_on_events(self, answer: HTTPResponse, relayed: Relayed, *, is_short: bool) -> None:
                """Passes events on: all of them, or one."""
                event = b""
                while line := answer.readline():
                    event += line
                    if line != b"\n":
                        continue
                    self._chunk(event)
                    fields = dict(part.partition(b": ")[::2] for part in event.splitlines())
                    event = b""
                    if b"id" in fields:
                        relayed.sent.append(fields[b"id"].decode())
                        if is_short:
                            return

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def posts(self) -> list[Relayed]:
        """Submissions."""
        return [one for one in self.relayed if one.method == "POST"]

    @property
    def streams(self) -> list[Relayed]:
        """Requests for events."""
        return [one for one in self.relayed if one.path.endswith("/events")]

    @contextmanager
    def relaying(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
