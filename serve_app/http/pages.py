"""Static pages: files that are served unchanged, and headers that limit a page to this server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.staticfiles import StaticFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike, stat_result
    from pathlib import Path

    from fastapi import Response
    from starlette.types import Scope

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
"""Content security policy. Scripts, styles and requests are limited to this server. Images come from it or
from the user's files."""


def headers(policy: Mapping[str, str] = POLICY) -> dict[str, str]:
    """Returns the headers of a page and its files."""
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # browsers revalidate the files on every visit
    }


class Files(StaticFiles):
    """Files of a directory, or one of them at whatever path.

    Args:
        directory: the directory.
        headers: headers of each answer.
        name: the file that is served at every path; None for the file that the path names.
        on_read: called for each answer with a file.
    """

    def __init__(
        self,
        directory: Path,
        headers: Mapping[str, str],
        *,
        name: str | None = None,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(directory=directory)
        self._headers = headers
        self._name = name
        self._on_read = on_read

    def get_path(self, scope: Scope) -> str:
        """Returns the path of the file that a request asks for."""
        return self._name or super().get_path(scope)

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """Returns the answer with a file, or a 304."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(self._headers)
        if self._on_read:
            self._on_read()
        return response
