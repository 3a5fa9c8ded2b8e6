"""The file store: files under names that cannot be guessed, kept for a limited time."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from deployments.observability.log import FAULT
from serve_app.errors import Failed, Full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fsspec import AbstractFileSystem

    from serve_app.config import StorageConfig

logger = logging.getLogger("ray.serve")

NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp|upload)")
UNFINISHED = re.compile(r"[0-9a-f]{32}\.part")
UNFINISHED_S = 3600
"""Age from which an unfinished file counts as abandoned."""
SWEEP_INTERVAL_S = 60.0
Result = TypeVar("Result")


class FileStore:
    """Keeps files in a folder, or behind any other URL that fsspec knows, such as S3's.

    Other files in the folder are safe: only files with names of this store are read or deleted.

    Attributes:
        kept_bytes: bytes of all files at the last sweep; None before the first one.
    """

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._fs, self._root = file_system(config)
        self._threads = ThreadPoolExecutor(thread_name_prefix="files")
        self._is_folder = isinstance(self._fs, LocalFileSystem)
        self._is_s3 = "s3" in self._fs.protocol
        self.kept_bytes: int | None = None
        if self._is_folder:
            self._fs.makedirs(self._root, exist_ok=True)

    @property
    def max_bytes(self) -> int:
        """Most bytes of all files."""
        return self._config.max_bytes

    def new_name(self, suffix: str) -> str:
        """Returns a new name of 128 random bits."""
        return f"{secrets.token_hex(16)}.{suffix}"

    async def save(self, data: bytes, suffix: str) -> str:
        """Keeps `data` under a new name, which is returned; see `save_as`."""
        name = self.new_name(suffix)
        await self.save_as(name, data)
        return name

    async def save_as(self, name: str, data: bytes, *, replace: bool = True) -> None:
        """Keeps `data` under a name of `new_name`. The file appears as a whole, and survives a loss of power.

        Args:
            name: the name.
            data: contents of the file.
            replace: whether it may replace a file of this name. An object store always replaces it, since not
                all of them know such a condition.

        Raises:
            FileExistsError: there is a file of this name, which it may not replace.
            Full: there is no room.
            Failed: it cannot be written; the log says why.
        """
        try:
            await self._in_thread(self._save, name, data, replace=replace)
        except (FileExistsError, Full):
            raise
        except Exception as error:
            logger.exception("a file could not be written", extra=FAULT)
            raise Failed(
                "The file could not be kept; the server's log says why.", code="storage_failed"
            ) from error

    async def _in_thread(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs a call in the store's own threads, so that a slow store delays nothing else."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))

    def _save(self, name: str, data: bytes, *, replace: bool) -> None:
        if not self._is_folder:  # an object store shows complete objects only
            self._fs.pipe_file(self._path(name), data, **self._described(name))
            return
        unfinished = self._path(self.new_name("part"))
        try:
            self._check_room(len(data))
            _write_through(unfinished, data)
            if replace:
                Path(unfinished).rename(self._path(name))
            else:
                Path(self._path(name)).hardlink_to(unfinished)
                Path(unfinished).unlink()
            _flush(self._root)
        except OSError as error:
            with suppress(OSError):
                self._fs.rm_file(unfinished)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full() from error
            raise

    def _described(self, name: str) -> dict[str, str]:
        """Returns what S3 is told of a file, so that it answers with the file's media type."""
        suffix = name.rpartition(".")[2]
        return {"ContentType": f"image/{suffix}"} if self._is_s3 and suffix != "upload" else {}

    async def check_room(self) -> None:
        """Checks that there is room for files, before work is done for one.

        Raises:
            Full: there is none.
        """
        if self._is_folder:
            await self._in_thread(self._check_room, 0)

    def _check_room(self, size: int) -> None:
        if shutil.disk_usage(self._root).free - size < self._config.min_free_bytes:
            raise _full()

    async def size(self, name: str) -> int | None:
        """Returns the bytes of a file; None if there is none, or if the name is not one of the store's."""
        if not NAME.fullmatch(name):
            return None
        try:
            size: int = await self._in_thread(self._fs.size, self._path(name))
        except FileNotFoundError:
            return None
        return size

    async def read(self, name: str, start: int, end: int) -> bytes | None:
        """Returns the bytes from `start` to before `end` of a file; None if it was deleted."""
        try:
            data: bytes = await self._in_thread(self._fs.cat_file, self._path(name), start=start, end=end)
        except FileNotFoundError:
            return None
        return data

    async def read_all(self, name: str) -> bytes | None:
        """Returns a file; None if there is none, or if the name is not one of the store's."""
        size = await self.size(name)
        return None if size is None else await self.read(name, 0, size)

    async def sizes(self) -> dict[str, int]:
        """Returns the bytes of all files, by their names."""
        found = await self._in_thread(self._find)
        return {name: info["size"] for name, info in found.items() if NAME.fullmatch(name)}

    def _find(self) -> dict[str, dict[str, Any]]:
        """Returns what the file system says of everything in the folder, by its name there."""
        found = self._fs.find(self._root, maxdepth=1, detail=True).values()
        return {info["name"].rpartition("/")[2]: info for info in found}

    async def delete(self, names: Iterable[str]) -> None:
        """Deletes files. Missing ones are ignored; the log says which ones could not be deleted."""
        await self._in_thread(self._delete, list(names))

    def _delete(self, names: list[str]) -> None:
        for name in filter(NAME.fullmatch, names):
            if problem := self._remove(self._path(name)):
                logger.warning("a file could not be deleted: %s", problem, extra=FAULT)

    async def signed_url(self, name: str) -> str | None:
        """Returns the object store's own URL of a file; None unless `presigned` is configured."""
        if not self._config.presigned:
            return None
        url: str = await self._in_thread(self._fs.sign, self._path(name), expiration=self._config.ttl_s)
        return url

    async def url(self, base: str, name: str) -> str:
        """Returns the URL of a file: the object store's own, or one below `base`."""
        return await self.signed_url(name) or f"{base}/files/{name}"

    async def sweep(self) -> None:
        """Deletes files that are too old, and the oldest of too many. Several replicas may do so.

        Raises:
            OSError: some files could not be deleted.
        """
        await self._in_thread(self._delete_old)

    @property
    def sweep_interval_s(self) -> float:
        """Seconds between two calls of `sweep`."""
        return min(SWEEP_INTERVAL_S, self._config.ttl_s / 4)

    def _delete_old(self) -> None:
        now, kept, is_full = time.time(), 0, False
        problems: list[str] = []
        found = [(_modified(info), name, info) for name, info in self._find().items()]
        newest_first = sorted(found, reverse=True, key=itemgetter(0))
        for modified, name, info in newest_first:
            path, age = info["name"], now - modified
            if NAME.fullmatch(name):
                # No file stays that is older than a deleted one.
                is_full = is_full or kept + info["size"] > self._config.max_bytes
                is_old = is_full or age > self._config.ttl_s
                problem = self._remove(path) if is_old else None
                if problem or not is_old:
                    kept += info["size"]
            else:
                is_old = bool(UNFINISHED.fullmatch(name)) and age > UNFINISHED_S
                problem = self._remove(path) if is_old else None
            if problem:
                problems.append(problem)
        self.kept_bytes = kept
        if problems:
            raise OSError(f"{len(problems)} files could not be deleted: {problems[0]}")

    def _remove(self, path: str) -> str | None:
        """Deletes a file; returns why it could not be deleted, or None. A missing file counts as deleted."""
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - S3's are of many kinds
            return getattr(error, "strerror", None) or type(error).__name__
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def file_system(config: StorageConfig) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a file store, and the path of the store in it."""
    # Other replicas write too, so a cached listing may be outdated.
    fs, root = url_to_fs(config.url, use_listings_cache=False, **config.options)
    return fs, root


def _modified(info: dict[str, Any]) -> float:
    """Returns the time of the last change, by `time.time`. Each file system of fsspec has its own key."""
    modified = next(info[key] for key in ("mtime", "LastModified", "created") if key in info)
    return modified.timestamp() if isinstance(modified, datetime) else float(modified)


def _write_through(path: str, data: bytes) -> None:
    """Writes a file; returns when the disk has it."""
    with Path(path).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: str) -> None:
    """Returns when the disk has the names of a folder's files."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _full() -> Full:
    return Full("The server's file storage is full; contact its operator.")
