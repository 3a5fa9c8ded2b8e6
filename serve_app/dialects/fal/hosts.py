"""fal's hosts as paths of this server.

`fal.run` is `/`, `queue.fal.run` is `/queue`, `rest.fal.ai` is `/`. A request to any host that begins with
`queue.` is for the queue too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from serve_app.dialects.base import path_of
from serve_app.dialects.fal.errors import error_response
from serve_app.http.errors import ProtocolError
from serve_app.observability import telemetry

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as ASGIMessage

PATHS = ("/fal-ai/", "/queue/", "/storage/", "/api/fal/")
"""Prefixes of this API's paths."""
PROXY = "/api/fal/proxy"
HOSTS = {
    "fal.run": ("", "/fal-ai/"),
    "queue.fal.run": ("/queue", "/fal-ai/"),
    "rest.fal.ai": ("", "/storage/"),
}
"""For each host: the prefix of its paths here, and the start of the paths that exist."""
TARGET = re.compile(
    rf"https://(?P<host>{'|'.join(map(re.escape, HOSTS))})(?P<path>/[!-~]*?)(\?(?P<query>[!-~]*))?"
)
REQUEST = re.compile(r"/requests/([0-9a-f-]{36})(/|$)")
REQUEST_ID = "x-fal-request-id"


class Hosts:
    """Middleware that maps fal's other hosts, and its JavaScript client's proxy, to routes of this server.

    It never calls another server. Every answer of this API gets the id of its request, except that to a fault
    of the server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http" or not path_of(scope).startswith(PATHS):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def named(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                asked = REQUEST.search(path_of(scope))
                request_id = asked[1] if asked else headers.get("x-request-id", "")
                MutableHeaders(raw=message["headers"]).setdefault(REQUEST_ID, request_id)
            await send(message)

        app = self._app
        if path_of(scope) == PROXY:
            match = TARGET.fullmatch(headers.get("x-fal-target-url", ""))
            prefix, begins = HOSTS[match["host"]] if match else ("", "")
            if match and match["path"].startswith(begins):
                _redirect(scope, prefix + match["path"], match["query"] or "")
            else:
                error = ProtocolError(
                    f"x-fal-target-url must be a URL of {', '.join(HOSTS)} that this server has a route for.",
                    param="x-fal-target-url",
                    status=412,
                )
                telemetry.note_error(error.code, error.status)
                app = error_response(error)
        elif headers.get("host", "").lower().startswith("queue.") and path_of(scope).startswith("/fal-ai/"):
            _redirect(scope, "/queue" + path_of(scope), scope["query_string"].decode("latin-1"))
        await app(scope, receive, named)


def _redirect(scope: Scope, path: str, query: str) -> None:
    scope["path"] = scope.get("root_path", "") + path
    scope["raw_path"] = scope["path"].encode()
    scope["query_string"] = query.encode("latin-1")
