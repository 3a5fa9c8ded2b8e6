"""A picture is rejected if pixels are missing, but not because of data beside or behind its pixels."""

import io
import struct
import zlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageFilter, PngImagePlugin

from deployments.families import FAMILIES
from deployments.types import Pixels
from serve_app.errors import InvalidParameter
from serve_app.generation import codec, containers

GLM_IMAGE = FAMILIES["glm_image"]
decode = partial(codec.decode_source, family=GLM_IMAGE, max_pixels=2**20, max_side=32_768)


def picture(width: int = 512, height: int = 512) -> Image.Image:
    """Returns a picture without large even areas."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunk(png: bytes, added: bytes) -> bytes:
    """Returns a PNG with one more chunk behind its header."""
    return png[:33] + added + png[33:]


PNG = file_of(picture())
EXPECTED = np.asarray(picture())
LONG = b"x" * 3_000_000


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"tEXt", b"workflow\0" + LONG),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"huge\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"broken\0\0not compressed"),
        chunk(b"iCCP", b"no profile\0\0" + zlib.compress(b"no profile")),
        chunk(b"eXIf", LONG),
        *(chunk(kind, b"", checksum=1) for kind in (b"tEXt", b"pHYs", b"iCCP", b"gAMA", b"eXIf", b"vpAg")),
        chunk(b"gAMA", bytes(4)),
        chunk(b"cHRM", bytes(32)),
        chunk(b"pHYs", b"short"),
    ],
    ids=lambda added: repr(added[4:24]),
)
def test_chunks_beside_the_pixels_refuse_no_picture(added: bytes) -> None:
    assert np.array_equal(decode(with_chunk(PNG, added)), EXPECTED)


def test_data_behind_a_png_are_ignored() -> None:
    assert np.array_equal(decode(PNG + LONG), EXPECTED)
    assert np.array_equal(decode(PNG + chunk(b"IDAT", LONG) * 3), EXPECTED)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_a_wrong_checksum_of_pixels_is_an_error(kind: bytes) -> None:
    at = PNG.index(kind) + 4 + int.from_bytes(PNG[PNG.index(kind) - 4 : PNG.index(kind)])
    with pytest.raises(InvalidParameter, match="broken"):
        decode(PNG[:at] + b"\0\0\0\0" + PNG[at + 4 :])


@pytest.mark.parametrize("progressive", [False, True])
def test_data_behind_a_jpeg_are_ignored(progressive: bool) -> None:
    """As in a motion photo, whose video follows the picture."""
    jpeg = file_of(picture(), "JPEG", quality=95, progressive=progressive)
    video = b"\xff\xda\0\x08\xff\xe1" * 50_000 + b"ftypmp42" + np.random.default_rng(1).bytes(4_000_000)
    assert np.array_equal(decode(jpeg + video), decode(jpeg))


def test_a_thumbnail_with_markers_of_its_own_is_skipped() -> None:
    jpeg = file_of(picture(), "JPEG", quality=95)
    thumbnail = file_of(picture(64, 64), "JPEG")
    inside = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert np.array_equal(decode(jpeg[:2] + inside + jpeg[2:]), decode(jpeg))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_that_lacks_only_its_end_marker_is_a_picture(options: dict[str, object]) -> None:
    jpeg = file_of(picture(), "JPEG", quality=95, **options)
    assert np.array_equal(decode(jpeg[:-2]), decode(jpeg))
    assert np.array_equal(decode(jpeg[:-1]), decode(jpeg))


def cuts(jpeg: bytes) -> Iterator[bytes]:
    for missing in (10, 100, 1000, len(jpeg) // 2):
        yield jpeg[:-missing]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_that_lacks_pixels_is_refused(options: dict[str, object]) -> None:
    for cut in cuts(file_of(picture(), "JPEG", quality=95, **options)):
        with pytest.raises(InvalidParameter, match="broken"):
            decode(cut)


def test_a_large_photo_is_decoded_at_a_fraction_of_its_size() -> None:
    photo = picture(2000, 1500)
    pixels = decode(file_of(photo, "JPEG", quality=95))
    small = np.asarray(photo.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BOX))
    assert pixels.shape[1] >= 500
    assert abs(pixels.astype(int) - small).mean() < 4


def test_a_photo_with_odd_sides_is_decoded_at_a_fraction_too() -> None:
    """Otherwise it would take the memory of all its pixels."""
    decoded_at = codec.legal_size(1001, 751, GLM_IMAGE)
    assert codec.legal_size(2001, 1501, GLM_IMAGE) != decoded_at
    assert decode(file_of(picture(2001, 1501), "JPEG", quality=95)).shape[1::-1] == decoded_at


def test_only_scans_of_the_picture_itself_are_counted() -> None:
    baseline, progressive = (file_of(picture(), "JPEG", progressive=one) for one in (False, True))
    inside = b"\xff\xe1" + struct.pack(">H", len(progressive[:60_000]) + 2) + progressive[:60_000]
    with_thumbnail = baseline[:2] + inside + baseline[2:]
    found = [containers.has_several_scans(one) for one in (baseline, with_thumbnail, progressive)]
    assert found == [False, False, True]


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.new("L", (8200, 4096)), "JPEG", {}),
        (Image.new("L", (2000, 1500)), "JPEG", {"progressive": True}),
        (Image.new("L", (2000, 1500)), "PNG", {}),
        (Image.new("L", (2000, 1500)), "WEBP", {}),
    ],
)
def test_a_picture_that_would_take_too_much_memory_is_refused(
    image: Image.Image, kind: str, options: dict[str, object]
) -> None:
    with pytest.raises(InvalidParameter, match="at most 1048576 pixels"):
        decode(file_of(image, kind, **options))


def test_a_long_screenshot_is_a_picture() -> None:
    shot = Image.new("RGB", (40, 25_000), (9, 9, 9))
    assert decode(file_of(shot)).shape == (2048, 512, 3)


def test_a_file_of_too_many_parts_is_refused() -> None:
    many = b"".join([PNG[:33], chunk(b"tEXt", b"a\0b") * 20_001, PNG[33:]])
    with pytest.raises(InvalidParameter, match="more parts"):
        decode(many)
    scans = b"\xff\xd8" + (b"\xff\xda\0\x02data") * 101 + b"\xff\xd9"
    with pytest.raises(InvalidParameter, match="more parts"):
        decode(scans)


def test_text_beside_the_pixels_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PngImagePlugin.PngStream, "chunk_zTXt", unpack)
    pixels: Pixels = decode(with_chunk(PNG, chunk(b"zTXt", b"a\0\0" + zlib.compress(LONG))))
    assert np.array_equal(pixels, EXPECTED)
