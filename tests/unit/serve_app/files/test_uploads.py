"""Names under which one image each may be stored."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from PIL import Image

from serve_app.config import StorageConfig
from serve_app.errors import InvalidParameter, RequestError
from serve_app.files import uploads as uploads_module
from serve_app.files.store import FileStore
from serve_app.files.uploads import VALID_S, Uploads
from serve_app.jobs.database import Database
from serve_app.jobs.signing import Signer

NOW = 1_800_000_000


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind)
    return file.getvalue()


async def in_parts(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 100):
        yield data[start : start + 100]


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(uploads_module, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path: Path, open_database: Callable[[str], Database]) -> Callable[[], Uploads]:
    files = FileStore(StorageConfig(url=str(tmp_path / "files"), min_free_bytes=0))
    return lambda: Uploads(files, Signer(open_database(f"sqlite:///{tmp_path}/jobs.db")), 1000)


def take(uploads: Uploads, place: tuple[str, int, str], data: bytes) -> None:
    asyncio.run(uploads.take(*place, in_parts(data)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_ingress_takes_what_another_one_has_let_in(make: Callable[[], Uploads], kind: str) -> None:
    place = asyncio.run(make().name())
    take(make(), place, picture(kind))
    with pytest.raises(RequestError, match="already") as caught:
        take(make(), place, picture(kind))
    assert caught.value.status == 409


def test_a_name_is_good_for_an_hour(make: Callable[[], Uploads], clock: Clock) -> None:
    uploads = make()
    place = asyncio.run(uploads.name())
    clock.now = NOW + VALID_S + 1
    with pytest.raises(RequestError, match="not any more") as caught:
        take(uploads, place, picture("PNG"))
    assert caught.value.status == 403
    with pytest.raises(RequestError, match="not valid"):
        take(uploads, (place[0], place[1] + 10, place[2]), picture("PNG"))
    clock.now = NOW + VALID_S
    take(uploads, place, picture("PNG"))


def test_what_is_no_image_or_too_large_is_not_kept(make: Callable[[], Uploads], tmp_path: Path) -> None:
    uploads = make()
    place = asyncio.run(uploads.name())
    for other in (b"", b"GIF89a", b"RIFF....WAVE", b"<html>"):
        with pytest.raises(InvalidParameter, match="must be PNG"):
            take(uploads, place, other)
    with pytest.raises(RequestError) as caught:
        take(uploads, place, picture("PNG") + bytes(1000))
    assert caught.value.status == 413
    assert list((tmp_path / "files").iterdir()) == []
