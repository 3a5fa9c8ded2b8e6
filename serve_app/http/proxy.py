"""Settings of Ray Serve's HTTP proxy, which reads every request before the application does.

Ray calls `configure` when it starts a proxy, if the variables of `ENVIRONMENT` are set. `make serve` sets
them, and so does the image of the container.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn.config
from starlette.middleware import Middleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.http.proxy:configure"}
TIMEOUT = b"x-request-timeout-seconds"
"""Header with the seconds after which Ray's proxy would answer by itself. The application rejects it."""


def configure() -> list[Middleware]:
    """Chooses the proxy's HTTP parser, and returns its middleware.

    The parser is h11. uvicorn would choose httptools, which drops the body of a request that offers another
    protocol (`Upgrade: h2c`), as Java's HTTP client does with every request.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = uvicorn.config.HTTP_PROTOCOLS["h11"]
    return [Middleware(ReadableHeaders)]


class ReadableHeaders:
    """Middleware that rewrites headers at which Ray's proxy would fail, so that the application answers.

    The proxy decodes some values as UTF-8. If they are not, it answers with a 500. When the seconds of
    `TIMEOUT` have passed, it answers in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if "headers" in scope:
            scope["headers"] = list(_readable(scope["headers"]))
        await self._app(scope, receive, send)


def _readable(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers:
        if name == TIMEOUT:
            yield name, b"0"  # no timeout
            continue
        try:
            value.decode()
        except UnicodeDecodeError:
            yield name, value.decode("latin-1").encode()
        else:
            yield name, value
