"""The playground: a page at `/` for trying the server, one at `/operator`, and their static files.

The files are plain HTML, CSS and JavaScript modules, served unchanged. The page uses this server's public
routes like any client. It contains no secrets, and asks the user for an API key where the server needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike, stat_result

    from fastapi import Response
    from starlette.types import Scope

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"
HEADERS = {
    # Scripts, styles and requests are limited to this server. Images come from it or from the user's files.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # browsers revalidate the files on every visit
}
MODULES = sorted(file.name for file in STATIC.glob("*.js") if file.stem != "operator")
"""Modules of the page at `/`."""
PRELOADS = ", ".join(f"<playground/{name}>; rel=modulepreload" for name in MODULES)
"""Its `Link` header: browsers load all modules at once, not one import after the other."""


class _Files(StaticFiles):
    """Files of a directory, or one of them at whatever path."""

    def __init__(
        self,
        directory: Path,
        headers: dict[str, str],
        *,
        name: str | None = None,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(directory=directory)
        self._headers = headers
        self._name = name
        self._on_read = on_read

    def get_path(self, scope: Scope) -> str:
        return self._name or super().get_path(scope)

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(self._headers)
        if self._on_read:
            self._on_read()
        return response


def routes(on_open: Callable[[], None] | None = None) -> list[BaseRoute]:
    """Returns the routes of the pages and their files, with gzip for clients that accept it.

    Args:
        on_open: called whenever a browser opens the page at `/`.
    """
    page = _Files(FOLDER, HEADERS | {"Link": PRELOADS}, name="index.html", on_read=on_open)
    operator = _Files(FOLDER, HEADERS, name="operator.html")
    return [
        Route("/", GZipMiddleware(page), name="playground"),
        Route("/operator", GZipMiddleware(operator), name="operator_page"),
        Mount("/playground", GZipMiddleware(_Files(STATIC, HEADERS))),
    ]
