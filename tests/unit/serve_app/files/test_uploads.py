"""Names under which one image each may be uploaded without a key."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from PIL import Image

from serve_app.config import StorageConfig
from serve_app.errors import Conflict, InvalidParameter, Refused, TooLarge
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
def test_every_ingress_accepts_the_names_of_the_others_once(make: Callable[[], Uploads], kind: str) -> None:
    place = asyncio.run(make().name())
    take(make(), place, picture(kind))
    with pytest.raises(Conflict, match="already") as caught:
        take(make(), place, picture(kind))
    assert caught.value.retryable


def test_of_two_uploads_at_the_same_time_one_is_kept(make: Callable[[], Uploads], tmp_path: Path) -> None:
    pictures = [picture("PNG"), picture("JPEG")]

    async def main() -> None:
        both_have_begun = asyncio.Barrier(2)

        async def slowly(data: bytes) -> AsyncIterator[bytes]:
            await both_have_begun.wait()
            yield data

        place = await make().name()
        taken = [make().take(*place, slowly(data)) for data in pictures]
        first, second = await asyncio.gather(*taken, return_exceptions=True)
        assert {type(first), type(second)} == {type(None), Conflict}
        kept = pictures[0] if first is None else pictures[1]
        assert [path.read_bytes() for path in (tmp_path / "files").iterdir()] == [kept]

    asyncio.run(main())


def test_a_name_is_valid_for_an_hour(make: Callable[[], Uploads], clock: Clock) -> None:
    uploads = make()
    place = asyncio.run(uploads.name())
    clock.now = NOW + VALID_S + 1
    with pytest.raises(Refused, match="expired"):
        take(uploads, place, picture("PNG"))
    with pytest.raises(Refused, match="invalid"):
        take(uploads, (place[0], place[1] + 10, place[2]), picture("PNG"))
    clock.now = NOW + VALID_S
    take(uploads, place, picture("PNG"))


def test_a_file_that_is_no_image_or_too_large_is_not_kept(
    make: Callable[[], Uploads], tmp_path: Path
) -> None:
    uploads = make()
    place = asyncio.run(uploads.name())
    for other in (b"", b"GIF89a", b"RIFF....WAVE", b"<html>"):
        with pytest.raises(InvalidParameter, match="must be PNG"):
            take(uploads, place, other)
    with pytest.raises(TooLarge, match="1000 bytes"):
        take(uploads, place, picture("PNG") + bytes(1000))
    assert list((tmp_path / "files").iterdir()) == []
