"""Source images become legal for both stages, broken ones are rejected with a reason, results are encoded."""

import io
import struct
import zlib
from functools import partial
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deployments.families import FAMILIES
from deployments.types import Pixels
from serve_app.errors import InvalidParameter
from serve_app.generation import codec
from serve_app.generation.codec import encode, legal_size
from serve_app.generation.request import Encoding

GLM_IMAGE = FAMILIES["glm_image"]
decode_source = partial(codec.decode_source, max_pixels=2**25, max_side=32_768)
WHITE = [255, 255, 255]
sides = st.integers(min_value=16, max_value=8192)


def file_of(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(width=sides, height=sides)
def test_every_size_becomes_legal(width: int, height: int) -> None:
    assert GLM_IMAGE.is_legal_size(*legal_size(width, height, GLM_IMAGE))


@given(width=st.integers(16, 64).map(lambda k: 32 * k), height=st.integers(16, 64).map(lambda k: 32 * k))
def test_a_legal_size_stays(width: int, height: int) -> None:
    assert legal_size(width, height, GLM_IMAGE) == (width, height)


@given(short=st.integers(16, 2048), aspect=st.floats(1, 4))
def test_the_aspect_is_kept_to_the_rounding(short: int, aspect: float) -> None:
    long = round(short * aspect)
    legal = legal_size(short, long, GLM_IMAGE)
    # Each side is rounded by at most 16 pixels of at least 512.
    assert legal[1] / legal[0] == pytest.approx(long / short, rel=0.07)


@pytest.mark.parametrize("size", [(16, 16), (300, 300), (513, 700), (2500, 600), (8192, 4096), (8192, 16)])
def test_sources_that_crash_upstream_become_legal(size: tuple[int, int]) -> None:
    pixels = decode_source(file_of(Image.new("RGB", size, (10, 20, 30))), GLM_IMAGE)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert GLM_IMAGE.is_legal_size(pixels.shape[1], pixels.shape[0])


def test_a_legal_source_keeps_its_pixels() -> None:
    pixels = noise(640, 512)
    assert np.array_equal(decode_source(file_of(Image.fromarray(pixels)), GLM_IMAGE), pixels)


def test_a_source_that_is_too_long_is_padded_not_squeezed() -> None:
    pixels = decode_source(file_of(Image.new("RGB", (2048, 128), (200, 0, 0))), GLM_IMAGE)
    assert pixels.shape == (512, 2048, 3)
    red_rows = (pixels == [200, 0, 0]).all(axis=2).all(axis=1)
    assert red_rows.sum() == 128
    assert (pixels[~red_rows] == WHITE).all()
    assert not red_rows[0]
    assert not red_rows[-1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_flattened_onto_white(mode: str) -> None:
    image = Image.new("RGBA", (512, 512), (0, 0, 0, 0)).convert(mode)
    data = file_of(image, transparency=image.getpixel((0, 0))) if mode == "P" else file_of(image)
    assert (decode_source(data, GLM_IMAGE) == WHITE).all()


def test_half_transparency_is_mixed_with_white() -> None:
    image = Image.new("RGBA", (512, 512), (255, 0, 0, 128))
    assert decode_source(file_of(image), GLM_IMAGE)[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image = Image.new("RGB", (1024, 512), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 512, 512))
    pixels = decode_source(file_of(image, exif=exif), GLM_IMAGE)
    assert pixels.shape == (1024, 512, 3)
    assert pixels[:512].mean(axis=(0, 1)).tolist() == [255, 0, 0]
    assert pixels[512:].max() == 0


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((512, 512), 0x8000, dtype=np.uint16))
    assert decode_source(file_of(image), GLM_IMAGE)[0, 0].tolist() == [128, 128, 128]


def test_transparency_in_sixteen_bits_is_white() -> None:
    image = Image.fromarray(np.full((512, 512), 7, dtype=np.uint16))
    assert (decode_source(file_of(image, transparency=7), GLM_IMAGE) == WHITE).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_broken_metadata_does_not_break_a_picture(image_format: str) -> None:
    data = file_of(
        Image.new("RGB", (512, 512), (9, 9, 9)), image_format, exif=b"Exif\0\0garbage", lossless=True
    )
    assert decode_source(data, GLM_IMAGE).shape == (512, 512, 3)


def test_every_exif_orientation_is_undone_as_pillow_does() -> None:
    pixels = noise(512, 544)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = file_of(Image.fromarray(pixels), exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(decode_source(data, GLM_IMAGE), np.asarray(expected))


def test_a_palette_shorter_than_its_transparency_is_rejected() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress((b"\0" + b"\0" * 512) * 512)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", struct.pack(">IIBBBBB", 512, 512, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(3)),
            chunk(b"tRNS", bytes(300)),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        ]
    )
    with pytest.raises(InvalidParameter, match="broken"):
        decode_source(data, GLM_IMAGE)


def test_cmyk_jpeg_and_webp_are_read() -> None:
    for data in (
        file_of(Image.new("CMYK", (512, 512), (0, 255, 255, 0)), "JPEG"),
        file_of(Image.new("RGB", (512, 512), (255, 0, 0)), "WEBP", lossless=True),
    ):
        assert decode_source(data, GLM_IMAGE)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_a_camera_jpeg_with_a_second_picture_is_one_picture() -> None:
    first, second = Image.new("RGB", (512, 512), (0, 0, 255)), Image.new("RGB", (512, 512))
    data = file_of(first, "MPO", save_all=True, append_images=[second])
    assert decode_source(data, GLM_IMAGE)[0, 0].tolist() == pytest.approx([0, 0, 255], abs=3)


png = file_of(Image.fromarray(noise(600, 600)))
frames = [Image.new("RGB", (512, 512), color) for color in ((0, 0, 0), (9, 9, 9))]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not a PNG"),
        (b"hello", "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (file_of(frames[0], "GIF"), "not a PNG"),
        (file_of(frames[0], "TIFF"), "not a PNG"),
        (file_of(frames[0], "BMP"), "not a PNG"),
        (png[:100], "broken"),
        (png[: len(png) // 2], "broken"),
        (png[:500] + bytes(500) + png[1000:], "broken"),
        (file_of(Image.fromarray(noise(600, 600)), "JPEG")[:5000], "broken"),
        (file_of(Image.new("RGB", (15, 600))), "15x600"),
        (file_of(Image.new("1", (30_000, 30_000))), "30000x30000"),
        (file_of(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated"),
        (file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated"),
    ],
)
def test_a_bad_source_is_rejected_with_the_reason(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidParameter, match=problem) as caught:
        decode_source(data, GLM_IMAGE)
    assert caught.value.param == "sources"


@settings(max_examples=200, deadline=None)  # a busy machine decodes slowly
@given(at=st.integers(0, 3000), garbage=st.binary(min_size=1, max_size=40))
def test_a_damaged_file_is_rejected_or_is_an_image(at: int, garbage: bytes) -> None:
    data = small_jpeg[:at] + garbage + small_jpeg[at + len(garbage) :]
    try:
        pixels = decode_source(data, GLM_IMAGE)
    except InvalidParameter:
        return
    assert GLM_IMAGE.is_legal_size(pixels.shape[1], pixels.shape[0])


exif = Image.Exif()
exif[0x0112] = 8
small_jpeg = file_of(Image.fromarray(noise(64, 64)), "JPEG", exif=exif)


def test_png_is_lossless() -> None:
    pixels = noise(64, 48)
    image = Image.open(io.BytesIO(encode(pixels, Encoding())))
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_a_lower_quality_makes_a_smaller_file(image_format: Literal["jpeg", "webp"]) -> None:
    pixels = noise(128, 128)
    low, high = (encode(pixels, Encoding(image_format, quality)) for quality in (0, 100))
    assert Image.open(io.BytesIO(high)).format == image_format.upper()
    assert len(low) < len(high) / 2
