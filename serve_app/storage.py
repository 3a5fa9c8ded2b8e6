"""The file store: results under names that cannot be guessed."""

from __future__ import annotations

import asyncio
import re
import secrets

from fsspec.core import url_to_fs

NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")


class FileStore:
    """Keeps files in a folder, or behind any other URL that fsspec knows."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = url_to_fs(url)
        self._fs.makedirs(self._root, exist_ok=True)

    async def save(self, data: bytes, suffix: str) -> str:
        """Keep `data` and return its name, of 128 random bits; nobody knows it before it is written."""
        name = f"{secrets.token_hex(16)}.{suffix}"
        await asyncio.to_thread(self._fs.pipe_file, f"{self._root}/{name}", data)
        return name

    async def size(self, name: str) -> int | None:
        """Bytes of the file of this name, or None: also for what is no name of ours, such as a path."""
        if not NAME.fullmatch(name):
            return None
        try:
            size: int = await asyncio.to_thread(self._fs.size, f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return size

    async def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end` of a file that there is."""
        data: bytes = await asyncio.to_thread(self._fs.cat_file, f"{self._root}/{name}", start, end)
        return data
