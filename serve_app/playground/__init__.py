"""The playground: a page at `/` for trying the server, one at `/operator`, and their static files.

The files are plain HTML, CSS and JavaScript modules, served unchanged. The page uses this server's public
routes like any client. It contains no secrets, and asks the user for an API key where the server needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Mount, Route

from serve_app.http.pages import Files, headers

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
HEADERS = headers()
MODULES = sorted(file.name for file in STATIC.glob("*.js") if file.stem != "operator")
"""Modules of the page at `/`."""
PRELOADS = ", ".join(f"<playground/{name}>; rel=modulepreload" for name in MODULES)
"""Its `Link` header: browsers load all modules at once, not one import after the other."""


def routes(on_open: Callable[[], None] | None = None) -> list[BaseRoute]:
    """Returns the routes of the pages and their files, with gzip for clients that accept it.

    Args:
        on_open: called whenever a browser opens the page at `/`.
    """
    page = Files(FOLDER, HEADERS | {"Link": PRELOADS}, name="index.html", on_read=on_open)
    operator = Files(FOLDER, HEADERS, name="operator.html")
    return [
        Route("/", GZipMiddleware(page), name="playground"),
        Route("/operator", GZipMiddleware(operator), name="operator_page"),
        Mount("/playground", GZipMiddleware(Files(STATIC, HEADERS))),
    ]
