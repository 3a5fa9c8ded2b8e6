"""The guard of open servers: no web page that a user visits may use them, or read what they have.

A browser sends requests of any page to any address, this machine's among them. A key would protect the
server, since the page does not know it. Without keys, the headers that browsers add tell whose request it is.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from serve_app.errors import Refused
from serve_app.http.auth import OPEN_PATHS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve_app.config import AppConfig
    from serve_app.errors import RequestError

READING = ("GET", "HEAD", "OPTIONS")
CHANGING_PATH = "/v1/internal/unload"
"""Path that changes something by GET too."""


def hosts_of(config: AppConfig) -> frozenset[str]:
    """Returns the names by which clients may call an open server, in lower case."""
    public = config.public_url.host if config.public_url else None
    own = ("localhost", socket.gethostname(), public, *config.auth.allowed_hosts)
    return frozenset(name.lower() for name in own if name)


class SiteGuard:
    """Middleware that rejects requests without a key if they come from a page of another site.

    Paths that need no key anywhere are for all.

    Args:
        app: the application behind it.
        hosts: names by which the server may be called. Addresses are always allowed, since they cannot be
            taken over by the owner of a name (DNS rebinding).
        respond: makes the answer to a rejected request.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], respond: Callable[[Scope, RequestError], ASGIApp]
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or rejects it."""
        app = self._app
        if scope["type"] == "http" and not scope["state"]["key_id"]:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not OPEN_PATHS.fullmatch(path) and (refusal := self._refusal(scope, path)):
                app = self._respond(scope, refusal)
        await app(scope, receive, send)

    def _refusal(self, scope: Scope, path: str) -> Refused | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        site = _split(f"//{host}")
        name = (site and site.hostname) or ""
        if name not in self._hosts and not _is_address(name) and not name.endswith(".localhost"):
            return Refused(
                f"This server is not known as {name!r:.100}; add the name to auth.allowed_hosts, or send a "
                "key.",
                code="unknown_host",
            )
        if scope["method"] in READING and path != CHANGING_PATH:
            return None
        origin = headers.get(b"origin", "")
        site = _split(origin)
        is_foreign = origin and not (site and site.netloc.lower() == host.lower())
        if is_foreign or headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin"):
            return Refused(
                f"Pages of other sites may not use this server without a key. This one is of "
                f"{origin or 'another site':.100}; send a key.",
                code="cross_site",
            )
        return None


def _split(url: str) -> SplitResult | None:
    """Returns the parts of a URL; None if it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
