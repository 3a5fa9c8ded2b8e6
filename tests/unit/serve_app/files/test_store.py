"""Files in a folder and on an S3 server: kept as a whole, for their time, and while there is room."""

import asyncio
import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from serve_app.config import StorageConfig
from serve_app.errors import Failed, Full
from serve_app.files.store import FileStore

DATA = bytes(range(256)) * 10
Make = Callable[..., FileStore]


@dataclass(frozen=True)
class Place:
    """A place for files. Its stores share them, as the replicas of an ingress do.

    Attributes:
        make: makes a store.
        names: lists the files.
        tick_s: seconds after which a file is newer than another one. S3's clock has seconds only.
    """

    make: Make
    names: Callable[[], set[str]]
    tick_s: float


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(partial(store, str(tmp_path)), lambda: {path.name for path in tmp_path.iterdir()}, 0.01)
    options: dict[str, Any] = request.getfixturevalue("s3")
    prefix = f"{tmp_path.name}/"

    def names() -> set[str]:
        listed = boto3.client("s3", **options).list_objects_v2(Bucket="files", Prefix=prefix)
        return {item["Key"].removeprefix(prefix) for item in listed.get("Contents", ())}

    return Place(partial(store, f"s3://files/{tmp_path.name}", options=options), names, 1.01)


def store(url: str, **settings: Any) -> FileStore:
    return FileStore(StorageConfig.model_validate({"url": url, "min_free_bytes": 0} | settings))


@pytest.fixture
def make(place: Place) -> Make:
    return place.make


def test_only_the_given_files_are_deleted(make: Make) -> None:
    async def main() -> None:
        files = make()
        names = [await files.save(DATA, "png") for _ in range(3)]
        await files.delete([names[0], names[1], names[1], "../escape.png", "none.png"])
        assert [await files.size(name) for name in names] == [None, None, len(DATA)]

    asyncio.run(main())


def test_a_file_can_be_read_as_a_whole_and_in_parts(make: Make) -> None:
    async def main() -> None:
        files = make()
        name = await files.save(DATA, "png")
        assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
        assert await files.save(DATA, "png") != name
        another = make()  # another replica's
        assert await another.size(name) == len(DATA)
        assert await another.read(name, 0, len(DATA)) == DATA
        assert await another.read(name, 100, 200) == DATA[100:200]

    asyncio.run(main())


@pytest.mark.parametrize(
    "name", ["", "x.png", "../secret.png", "0" * 32 + ".png", "0" * 32 + ".part", "0" * 32 + ".png/..", "\0"]
)
def test_a_name_of_another_form_is_no_file(make: Make, name: str) -> None:
    assert asyncio.run(make().size(name)) is None


def test_files_are_deleted_when_they_are_too_old(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    files = place.make(ttl_s=100)
    name = asyncio.run(files.save(DATA, "png"))
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr("serve_app.files.store.time.time", lambda: now + 90)
        asyncio.run(files.sweep())
    assert place.names() == {name}
    assert files.kept_bytes == len(DATA)
    with monkeypatch.context() as later:
        later.setattr("serve_app.files.store.time.time", lambda: now + 102)
        asyncio.run(files.sweep())
    assert place.names() == set()
    assert files.kept_bytes == 0


def test_the_oldest_files_are_deleted_when_there_are_too_many(place: Place) -> None:
    files = place.make(max_bytes=3 * len(DATA))
    kept: list[str] = []
    for _ in range(5):
        kept.append(asyncio.run(files.save(DATA, "webp")))
        time.sleep(place.tick_s)
    asyncio.run(files.sweep())
    assert place.names() == set(kept[2:])


def test_files_that_cannot_be_deleted_count_and_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    files = store(str(tmp_path), max_bytes=len(DATA))
    for _ in range(3):
        asyncio.run(files.save(DATA, "png"))
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "rm_file", fail)
        with pytest.raises(OSError, match="2 files could not be deleted: Operation not permitted"):
            asyncio.run(files.sweep())
        assert files.kept_bytes == 3 * len(DATA)
    asyncio.run(files.sweep())
    assert files.kept_bytes == len(DATA)


def test_no_file_stays_that_is_older_than_a_deleted_one(place: Place) -> None:
    files = place.make(max_bytes=100)
    sizes = {}
    for size in (30, 50, 60):
        sizes[asyncio.run(files.save(b"x" * size, "png"))] = size
        time.sleep(place.tick_s)
    asyncio.run(files.sweep())
    assert [sizes[name] for name in place.names()] == [60]


def test_other_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    files = store(str(tmp_path), ttl_s=1, max_bytes=0)
    (tmp_path / "sub").mkdir()
    others = [tmp_path / "mine.png", tmp_path / "sub" / ("0" * 32 + ".png"), tmp_path / ("0" * 31 + ".png")]
    unfinished, fresh = (tmp_path / (digit * 32 + ".part") for digit in "12")
    for path in (*others, unfinished, fresh):
        path.write_bytes(DATA)
        os.utime(path, (0, 0))
    os.utime(fresh)
    asyncio.run(files.sweep())
    assert all(path.exists() for path in (*others, fresh))
    assert not unfinished.exists()


@pytest.mark.parametrize(("ttl_s", "interval_s"), [(1, 0.25), (100, 25), (86_400, 60)])
def test_files_are_swept_several_times_within_their_life(
    tmp_path: Path, ttl_s: int, interval_s: float
) -> None:
    assert store(str(tmp_path), ttl_s=ttl_s).sweep_interval_s == interval_s


def test_a_file_that_cannot_be_written_is_an_error_without_a_retry(tmp_path: Path) -> None:
    files = store(str(tmp_path / "files"))
    (tmp_path / "files").rmdir()
    (tmp_path / "files").write_text("no folder")
    with pytest.raises(Failed) as caught:
        asyncio.run(files.save(DATA, "png"))
    assert (caught.value.code, caught.value.retryable) == ("storage_failed", False)


def test_a_file_that_was_deleted_has_no_bytes(make: Make) -> None:
    assert asyncio.run(make().read("0" * 32 + ".png", 0, 10)) is None


def test_a_file_appears_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    flushed: list[bytes | None] = []
    rename, flush = Path.rename, os.fsync

    def renamed(*paths: Any) -> Any:
        seen.append(sorted(path.suffix for path in tmp_path.iterdir()))
        return rename(*paths)

    def observed(number: int) -> None:
        opened = Path(f"/proc/self/fd/{number}").resolve()
        flushed.append(opened.read_bytes() if opened.is_file() else None)
        flush(number)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(os, "fsync", observed)
    name = asyncio.run(store(str(tmp_path)).save(DATA, "png"))
    assert seen == [[".part"]]
    assert flushed == [DATA, None], "the file before it has its name, then the folder"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def is_full(files: FileStore) -> None:
    with pytest.raises(Full, match="storage is full") as caught:
        asyncio.run(files.save(DATA, "png"))
    assert not caught.value.retryable


def test_the_reserve_of_the_disk_stays_free(tmp_path: Path) -> None:
    files = store(str(tmp_path), min_free_bytes=2**60)
    is_full(files)
    with pytest.raises(Full):
        asyncio.run(files.check_room())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:

    def fill(_: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", fill)
    is_full(store(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_serves_files_itself_if_configured(s3: dict[str, Any]) -> None:
    async def url(*, presigned: bool) -> str | None:
        files = store("s3://files/signed", options=s3, presigned=presigned)
        name = await files.save(DATA, "png")
        url = await files.url("http://localhost", name)
        assert (await files.signed_url(name) is None) == (url == f"http://localhost/files/{name}")
        return await files.signed_url(name)

    assert asyncio.run(url(presigned=False)) is None
    signed = asyncio.run(url(presigned=True))
    assert signed is not None
    assert "Signature=" in signed
    answer = httpx.get(signed)
    assert (answer.content, answer.headers["content-type"]) == (DATA, "image/png")
    with pytest.raises(ValidationError, match="other stores cannot sign"):
        StorageConfig(url="file:///files", presigned=True)
    with pytest.raises(ValidationError, match="ttl_s is above 604800"):
        StorageConfig(url="s3://files", presigned=True, ttl_s=604_801)
