"""Takes webhooks, as their receivers do."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver:
    """Answers with the statuses that it is given, the last one for ever, and keeps what came.

    Attributes:
        statuses: of the answers to come.
        came: the headers and the body of each message.
        place: host and port.
    """

    def __init__(self) -> None:
        self.statuses = [200]
        self.came: list[tuple[Mapping[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.came.append((dict(self.headers), body))
                statuses = receiver.statuses
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                receiver.came.append(({}, b"followed"))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.place}/hook?token=t"

    @contextmanager
    def receiving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        yield
        self._server.shutdown()
        self._server.server_close()
        thread.join()
