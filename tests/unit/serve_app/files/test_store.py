"""Files in a folder and on an S3 server: kept whole, for their time, and while there is room."""

import asyncio
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from serve_app.config import StorageConfig
from serve_app.errors import RequestError
from serve_app.files.store import FileStore

DATA = bytes(range(256)) * 10
Make = Callable[..., FileStore]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """The options of a bucket on moto's server."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            environment.setenv(f"AWS_{name}", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer(port=0)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="files")
        yield {"endpoint_url": endpoint}
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "folder":
        where: dict[str, Any] = {"url": str(tmp_path)}
    else:
        where = {"url": f"s3://files/{tmp_path.name}", "options": request.getfixturevalue("s3")}
    return lambda **settings: FileStore(StorageConfig(**where, min_free_bytes=0, **settings))


def test_what_is_deleted_is_gone_and_nothing_else(make: Make) -> None:
    async def main() -> None:
        store = make()
        names = [await store.save(DATA, "png") for _ in range(3)]
        await store.delete([names[0], names[1], names[1], "../escape.png", "none.png"])
        assert [await store.size(name) for name in names] == [None, None, len(DATA)]

    asyncio.run(main())


def test_what_is_kept_can_be_read_again_whole_and_in_parts(make: Make) -> None:
    async def main() -> None:
        store = make()
        name = await store.save(DATA, "png")
        assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
        assert await store.save(DATA, "png") != name
        another = make()  # another replica's
        assert await another.size(name) == len(DATA)
        assert await another.read(name, 0, len(DATA)) == DATA
        assert await another.read(name, 100, 200) == DATA[100:200]

    asyncio.run(main())


@pytest.mark.parametrize(
    "name", ["", "x.png", "../secret.png", "0" * 32 + ".png", "0" * 32 + ".part", "0" * 32 + ".png/..", "\0"]
)
def test_what_is_no_name_of_a_file_is_not_there(make: Make, name: str) -> None:
    assert asyncio.run(make().size(name)) is None


def names(store: FileStore) -> set[str]:
    return {path.rpartition("/")[2] for path in store._fs.find(store._root)}


def test_files_go_when_they_are_too_old(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(ttl_s=100)
    name = asyncio.run(store.save(DATA, "png"))
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr("serve_app.files.store.time.time", lambda: now + 90)
        store.sweep()
    assert names(store) == {name}
    with monkeypatch.context() as later:
        later.setattr("serve_app.files.store.time.time", lambda: now + 102)
        store.sweep()
    assert names(store) == set()


def test_the_oldest_files_go_when_there_are_too_many(make: Make) -> None:
    store = make(max_bytes=3 * len(DATA))
    kept: list[str] = []
    for _ in range(5):
        kept.append(asyncio.run(store.save(DATA, "webp")))
        time.sleep(0.01 if store._is_folder else 1.01)  # by S3's clock, which has seconds only, one is older
    store.sweep()
    assert names(store) == set(kept[2:])


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), ttl_s=1, max_bytes=0, min_free_bytes=0))
    (tmp_path / "sub").mkdir()
    others = [tmp_path / "mine.png", tmp_path / "sub" / ("0" * 32 + ".png"), tmp_path / ("0" * 31 + ".png")]
    unfinished, fresh = (tmp_path / (digit * 32 + ".part") for digit in "12")
    for path in (*others, unfinished, fresh):
        path.write_bytes(DATA)
        os.utime(path, (0, 0))
    os.utime(fresh)
    store.sweep()
    assert all(path.exists() for path in (*others, fresh))
    assert not unfinished.exists()


def test_files_are_swept_again_and_again(make: Make) -> None:
    async def main() -> None:
        store = make(max_bytes=0, ttl_s=1)
        async with store.sweeping(), asyncio.timeout(20):
            await store.save(DATA, "png")
            while await asyncio.to_thread(names, store):  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.02)

    asyncio.run(main())


def test_a_failure_does_not_end_the_sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), ttl_s=1))
    times: list[int] = []

    def sweep() -> None:
        times.append(1)
        raise RuntimeError("botocore's own kind")

    monkeypatch.setattr(store, "sweep", sweep)

    async def main() -> None:
        async with store.sweeping(), asyncio.timeout(20):
            while len(times) < 2:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.02)

    asyncio.run(main())


def test_what_cannot_be_written_is_not_worth_a_retry(tmp_path: Path) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path / "files"), min_free_bytes=0))
    (tmp_path / "files").rmdir()
    (tmp_path / "files").write_text("no folder")
    with pytest.raises(RequestError) as caught:
        asyncio.run(store.save(DATA, "png"))
    assert caught.value.status == 500
    assert caught.value.code == "storage_failed"
    assert caught.value.headers["x-should-retry"] == "false"


def test_a_file_that_is_swept_while_it_is_asked_for_is_not_there(make: Make) -> None:
    assert asyncio.run(make().read("0" * 32 + ".png", 0, 10)) is None


def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), min_free_bytes=0))
    seen: list[list[str]] = []
    move = store._fs.mv

    def observed(*paths: str) -> None:
        seen.append(sorted(path.suffix for path in tmp_path.iterdir()))
        move(*paths)

    monkeypatch.setattr(store._fs, "mv", observed)
    name = asyncio.run(store.save(DATA, "png"))
    assert seen == [[".part"]]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def refused(store: FileStore) -> None:
    with pytest.raises(RequestError) as caught:
        asyncio.run(store.save(DATA, "png"))
    assert caught.value.status == 507
    assert "b64_json" in caught.value.message


def test_what_is_to_be_left_of_the_disk_is_left(tmp_path: Path) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), min_free_bytes=2**60))
    refused(store)
    with pytest.raises(RequestError):
        asyncio.run(store.check_room())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_leaves_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = FileStore(StorageConfig(url=str(tmp_path), min_free_bytes=0))

    def fill(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:10])
        raise OSError(number, "full")

    monkeypatch.setattr(store._fs, "pipe_file", fill)
    refused(store)
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_hands_out_files_itself_if_that_is_wanted(s3: dict[str, Any]) -> None:
    async def url(*, presigned: bool) -> str | None:
        store = FileStore(StorageConfig(url="s3://files/signed", options=s3, presigned=presigned))
        return await store.signed_url(await store.save(DATA, "png"))

    assert asyncio.run(url(presigned=False)) is None
    signed = asyncio.run(url(presigned=True))
    assert signed is not None
    assert "Signature=" in signed
    assert httpx.get(signed).content == DATA
    with pytest.raises(ValidationError, match="nothing else signs"):
        StorageConfig(url="file:///files", presigned=True)
    with pytest.raises(ValidationError, match="signs at most"):
        StorageConfig(url="s3://files", presigned=True, ttl_s=604_801)
