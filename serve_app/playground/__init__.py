"""The playground: a page at `/` to try the server on, and the files that it is made of.

They are plain HTML, CSS and JavaScript modules, served as they are. The page uses this server's own routes as
any client does, and holds nothing secret: whoever needs a key is asked for it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from os import PathLike, stat_result

    from fastapi import Response
    from starlette.types import Scope

FOLDER = Path(__file__).parent
HEADERS = {
    # Scripts, styles and requests are this server's own; pictures are too, or were chosen by the user.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again each time, and sent again when it has changed
}


class _Files(StaticFiles):
    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response


def routes() -> list[BaseRoute]:
    """The page's and its files', compressed for clients that take it."""
    page = GZipMiddleware(_Files(directory=FOLDER, html=True))
    files = GZipMiddleware(_Files(directory=FOLDER / "static"))
    return [Route("/", page, name="playground"), Mount("/playground", files)]
