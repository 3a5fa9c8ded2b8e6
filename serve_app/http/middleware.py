"""Middleware: a prefix without its slash, HEAD requests, headers that are rejected, bounds on bodies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.responses import RedirectResponse

from serve_app.errors import Invalid, RequestError
from serve_app.http.errors import compressed, too_large, too_many_bytes, too_slow
from serve_app.http.proxy import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve_app.config import Limits

NOT_BY_HEAD = ("/unload", "/events", "/stream")
"""Ends of paths that HEAD must not call as GET: it would unload models, or wait for a stream's end."""


class PrefixSlash:
    """Leads from the application's prefix without a slash, such as `/img`, to the playground at `/img/`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or redirects it."""
        app, prefix = self._app, scope.get("root_path", "")
        if prefix and scope["type"] == "http" and scope["path"] == prefix:
            # Relative, since a proxy may have removed a prefix of its own.
            app = RedirectResponse(prefix.rpartition("/")[2] + "/")
        await app(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET; the HTTP server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope.get("method") == "HEAD" and not scope["path"].endswith(NOT_BY_HEAD):
            scope["method"] = "GET"
        await self._app(scope, receive, send)


class HeaderGuard:
    """Rejects headers that ask for what would go wrong.

    Two are for Ray Serve's proxy (serve/_private/http_util.py in Ray). One keeps it from noticing that the
    client has hung up, so that its work would go on. The other lets it answer, in plain text, when some
    seconds have passed. The third announces a compressed body.
    """

    OF_THE_PROXY = (b"x-request-disconnect-disabled", TIMEOUT)

    def __init__(self, app: ASGIApp, respond: Callable[[Scope, RequestError], ASGIApp]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or rejects it."""
        app, headers = self._app, dict(scope.get("headers", ()))
        for header in self.OF_THE_PROXY:
            if header in headers:
                name = header.decode()
                problem = Invalid(f"The header {name} is not allowed; remove it.", param=name)
                app = self._respond(scope, problem)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            app = self._respond(scope, compressed())
        await app(scope, receive, send)


class BodyLimit:
    """Rejects a body as soon as it is too large, by its bytes or by its announcement, or takes too long.

    All bodies together are bounded too, since they arrive before their requests are accepted.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._max_bytes = limits.max_body_bytes
        self._max_together = limits.max_bodies_bytes
        self._timeout_s = limits.body_timeout_s
        self._together = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on, and counts the bytes of the body."""
        received = 0
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        deadline: float | None = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal received, deadline
            if announced.isdigit() and int(announced) > self._max_bytes:
                raise too_large(self._max_bytes)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise too_slow(self._timeout_s) from None
            if not message.get("more_body"):
                deadline = None  # the next message comes when the client disconnects
            size = len(message.get("body", b""))
            received += size
            self._together += size
            if received > self._max_bytes:
                raise too_large(self._max_bytes)
            if self._together > self._max_together:
                raise too_many_bytes()
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._together -= received
