"""The URLs in answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import Request
    from pydantic import HttpUrl

    from serve_app.files.store import FileStore


class Links:
    """Makes URLs that clients can follow: below `public_url` or, if that is None, below what they used."""

    def __init__(self, files: FileStore, public_url: HttpUrl | None) -> None:
        self._files = files
        self._public_url = public_url

    def base(self, request: Request) -> str:
        """What all URLs of an answer begin with, without a slash at the end."""
        return str(self._public_url or request.base_url).rstrip("/")

    async def file(self, base: str, name: str) -> str:
        """Where a stored file is: at the object store itself, if the configuration says so."""
        return await self._files.signed_url(name) or f"{base}/files/{name}"
