"""Source images: data URLs, files of the store, and URLs of other servers."""

import asyncio
import base64
import io
from urllib.parse import quote

import pytest
from PIL import Image

from deployments.families import FAMILIES
from serve_app.config import Limits, OutboundConfig
from serve_app.errors import InvalidParameter, TooLarge
from serve_app.files.store import FileStore
from serve_app.generation.sources import SourceReader
from serve_app.outbound import Outbound

DATA = bytes(range(256)) * 4


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def small(files: FileStore) -> SourceReader:
    """A reader of images of at most 1024 bytes."""
    return SourceReader(Outbound(OutboundConfig()), files, Limits(max_image_bytes=1024))


@pytest.mark.parametrize("media_type", ["image/png", "", "text/plain;charset=utf-8"])
def test_a_data_url_is_read_whatever_its_media_type(small: SourceReader, media_type: str) -> None:
    assert asyncio.run(small.read(data_url(DATA, media_type))) == DATA
    assert asyncio.run(small.read(data_url(DATA).replace("data:", "DATA:"))) == DATA


def in_lines(text: str, width: int, end: str) -> str:
    return end.join(text[at : at + width] for at in range(0, len(text), width))


BASE64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "written",
    [
        in_lines(BASE64, 76, "\r\n"),
        in_lines(BASE64, 64, "\n"),
        f" \t{BASE64}\f\n",
        BASE64.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        quote(BASE64, safe=""),
        quote(in_lines(BASE64, 76, "\r\n"), safe=""),
    ],
    ids=["MIME", "PEM", "spaces", "no padding", "URL-safe", "URL-safe without padding", "percent", "both"],
)
def test_base64_may_be_written_in_all_usual_ways(small: SourceReader, written: str) -> None:
    for start in ("data:image/png;base64,", "data:image/png; BASE64,", "data:;base64,"):
        assert asyncio.run(small.read(start + written)) == DATA


def test_a_data_url_may_be_percent_encoded_alone(small: SourceReader) -> None:
    assert asyncio.run(small.read(f"data:image/png,{quote(DATA, safe='')}")) == DATA
    with pytest.raises(TooLarge, match="1024 bytes"):
        asyncio.run(small.read(f"data:image/png,{quote(DATA + b'1', safe='')}"))


def test_a_data_url_above_the_limit_is_too_large(small: SourceReader) -> None:
    with pytest.raises(TooLarge, match="1024 bytes"):
        asyncio.run(small.read(data_url(DATA + b"four")))


def test_a_data_url_that_is_not_base64_is_rejected(small: SourceReader) -> None:
    for wrong in ("?", "A", "AAAAA", "AA=A", "AA%00A", "ÄAAA"):
        with pytest.raises(InvalidParameter, match="not base64") as caught:
            asyncio.run(small.read(f"data:image/png;base64,{wrong}"))
    assert (caught.value.param, caught.value.code) == ("sources", "invalid_image_url")


@pytest.mark.parametrize("base", ["http://localhost:8000", "https://images.test/below", "HTTP://10.0.0.1"])
def test_a_file_of_the_store_is_read_without_a_connection(
    small: SourceReader, files: FileStore, base: str
) -> None:
    async def main() -> bytes:
        name = await files.save(DATA, "png")
        return await small.read(f"{base}/files/{name}")

    assert asyncio.run(main()) == DATA


def test_a_file_of_the_store_above_the_limit_is_too_large(small: SourceReader, files: FileStore) -> None:
    async def main() -> bytes:
        name = await files.save(DATA + b"four", "png")
        return await small.read(f"http://localhost:8000/files/{name}")

    with pytest.raises(TooLarge, match="1024 bytes"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a.png", "http://127.0.0.1/files/nothing.png", "no url", ""]
)
def test_a_url_that_cannot_be_fetched_is_rejected(small: SourceReader, url: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asyncio.run(small.read(url))
    assert (caught.value.param, caught.value.code) == ("sources", "invalid_image_url")


def test_files_and_urls_are_decoded_in_their_order(sources: SourceReader) -> None:
    files = []
    for side in (512, 544):
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, "PNG")
        files.append(file.getvalue())
    decoded = asyncio.run(sources.decode((files[0], data_url(files[1])), FAMILIES["glm_image"]))
    assert [pixels.shape for pixels in decoded] == [(512, 512, 3), (544, 544, 3)]
    with pytest.raises(InvalidParameter, match="not a PNG"):
        asyncio.run(sources.decode((files[0], DATA), FAMILIES["glm_image"]))
