"""Source images are converted to sRGB as LittleCMS does it with the same colour spaces."""

import io
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from deployments.families import FAMILIES
from deployments.types import Pixels
from serve_app.generation import codec
from tests.unit.serve_app.generation.test_containers import chunk, file_of, picture, with_chunk

decode = partial(codec.decode_source, family=FAMILIES["glm_image"], max_pixels=2**20, max_side=32_768)
SRGB = ImageCms.createProfile("sRGB")
WIDE = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
"""White and primaries of Display P3."""
USUAL = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def lab_profile() -> bytes:
    """A profile for numbers that no picture of ours has."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def swapped() -> bytes:
    """The profile of a display whose red and blue are exchanged."""
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    return profile.replace(b"rXYZ", b"oXYZ").replace(b"bXYZ", b"rXYZ").replace(b"oXYZ", b"bXYZ")


def grey(exponent: float) -> bytes:
    """A profile of grey, whose values become light by an exponent."""
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256)) + bytes(2)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve))
    header = struct.pack(
        ">I4sI4s4s4s", 156 + len(white) + len(curve), b"", 0x02100000, b"mntr", b"GRAY", b"XYZ "
    )
    header = (header + bytes(12) + b"acsp").ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + white + curve


def by_littlecms(image: Image.Image, profile: bytes) -> Pixels:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    assert converted
    return pixels(converted)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})]
)
def test_a_profile_is_applied(kind: str, options: dict[str, Any]) -> None:
    data = file_of(picture(), kind, icc_profile=swapped(), **options)
    expected = by_littlecms(Image.open(io.BytesIO(data)), swapped())
    assert np.array_equal(decode(data), expected)
    assert not np.array_equal(expected, pixels(Image.open(io.BytesIO(data))))


def test_the_alpha_channel_is_no_colour() -> None:
    image = picture()
    image.putalpha(Image.new("L", image.size, 0))
    image.paste((200, 10, 10, 255), (0, 0, 256, 512))
    seen = decode(file_of(image, icc_profile=swapped()))
    assert (seen[:, 256:] == 255).all()
    red = Image.new("RGB", (1, 1), (200, 10, 10))
    assert (seen[:, :256] == by_littlecms(red, swapped())[0, 0]).all()


def test_a_palette_has_the_colours_of_its_profile() -> None:
    image = picture().quantize(16)
    expected = by_littlecms(image.convert("RGB"), swapped())
    assert np.array_equal(decode(file_of(image, icc_profile=swapped())), expected)


@pytest.mark.parametrize("profile", [grey(1.0), swapped()], ids=["grey", "rgb"])
def test_grey_has_the_brightness_of_its_profile(profile: bytes) -> None:
    image = picture().convert("L")
    expected = by_littlecms(image if profile == grey(1.0) else image.convert("RGB"), profile)
    assert np.array_equal(decode(file_of(image, icc_profile=profile)), expected)
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    assert np.array_equal(decode(file_of(deep, icc_profile=profile)), expected)


@pytest.mark.parametrize(
    "profile",
    [b"garbage", b"\0" * 200, lab_profile(), swapped()[:300], b"\0" * (2**22 + 1)],
    ids=["garbage", "zeros", "lab", "cut", "huge"],
)
def test_a_profile_that_does_not_fit_is_ignored(profile: bytes) -> None:
    image = picture()
    for kind, options in (("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})):
        expected = pixels(Image.open(io.BytesIO(file_of(image, kind, **options))))
        assert np.array_equal(decode(file_of(image, kind, icc_profile=profile, **options)), expected)


def test_a_picture_without_colour_facts_keeps_its_bytes() -> None:
    assert np.array_equal(decode(file_of(picture())), pixels(picture()))
    tagged = file_of(picture(), icc_profile=ImageCms.ImageCmsProfile(SRGB).tobytes())
    assert np.array_equal(decode(tagged), pixels(picture()))


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def primaries(points: tuple[float, ...]) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(point * 100_000) for point in points)))


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"sRGB", b"\0") + gamma(1.0),
        gamma(0.45455),
        gamma(0.45455) + primaries(USUAL),
        primaries(USUAL),
        gamma(0.45455) + primaries((0.3127, 0.329, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)),
    ],
    ids=["sRGB", "gamma", "both", "primaries", "impossible"],
)
def test_a_png_that_says_what_is_usual_keeps_its_bytes(chunks: bytes) -> None:
    assert np.array_equal(decode(with_chunk(file_of(picture()), chunks)), pixels(picture()))


def linear(values: Pixels) -> np.ndarray[Any, Any]:
    """sRGB's values as light: https://www.w3.org/Graphics/Color/srgb."""
    share = values / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def test_a_png_of_linear_light_is_made_brighter() -> None:
    seen = decode(with_chunk(file_of(picture()), gamma(1.0)))
    assert abs(linear(seen) - pixels(picture()) / 255).max() < 0.005


def test_a_png_with_wide_primaries_becomes_more_saturated() -> None:
    """The matrix is the product of both spaces' matrices: Display P3 to XYZ, and XYZ to sRGB."""
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    image = picture()
    expected = np.clip(linear(pixels(image)) @ to_srgb.T, 0, 1)
    seen = decode(with_chunk(file_of(image), gamma(0.45455) + primaries(WIDE)))
    assert abs(linear(seen) - expected).max() < 0.01
    assert not np.array_equal(seen, pixels(image))


def coded(*points: int) -> Pixels:
    """The test's picture, in the colours of a `cICP` chunk."""
    return decode(with_chunk(file_of(picture()), chunk(b"cICP", bytes(points))))


def test_code_points_say_the_same_as_other_chunks() -> None:
    """https://www.w3.org/TR/png-3/#cICP-chunk."""
    for points, chunks in (
        ((12, 13, 0, 1), gamma(0.45455) + primaries(WIDE)),
        ((12, 8, 0, 1), gamma(1.0) + primaries(WIDE)),
        ((1, 8, 0, 1), gamma(1.0)),
        ((1, 5, 0, 1), gamma(1 / 2.8)),
    ):
        expected = decode(with_chunk(file_of(picture()), chunks))
        assert not np.array_equal(expected, pixels(picture()))
        assert np.array_equal(coded(*points), expected), points


@pytest.mark.parametrize(
    "points", [(1, 13, 0, 1), (2, 13, 0, 1), (1, 2, 0, 1), (12, 13, 1, 1), (12, 13, 0, 0), (12, 13), ()]
)
def test_code_points_of_srgb_or_of_no_meaning_change_nothing(points: tuple[int, ...]) -> None:
    assert np.array_equal(coded(*points), pixels(picture()))


def test_code_points_count_more_than_a_profile() -> None:
    point = chunk(b"cICP", bytes((1, 13, 0, 1)))
    assert np.array_equal(
        decode(with_chunk(file_of(picture(), icc_profile=swapped()), point)), pixels(picture())
    )


def test_video_curves_are_those_of_bt_709() -> None:
    values = pixels(picture()) / 255
    light = np.where(values < 0.081, values / 4.5, ((values + 0.099) / 1.099) ** (1 / 0.45))
    for transfer in (1, 6, 14, 15):
        assert abs(linear(coded(1, transfer, 0, 1)) - light).max() < 0.005


@pytest.mark.parametrize(
    ("transfer", "nits"),
    [
        # Signals and their light in table 1 of https://www.itu.int/pub/R-REP-BT.2408.
        (16, {0.38: 26, 0.58: 203, 0.75: 203, 1.0: 203}),
        (18, {0.38: 26, 0.75: 203, 0.9: 203, 1.0: 203}),
    ],
)
def test_high_dynamic_range_is_as_bright_as_its_white(transfer: int, nits: dict[float, int]) -> None:
    for signal, light in nits.items():
        grey = Image.new("RGB", (512, 512), (round(signal * 255),) * 3)
        seen = decode(with_chunk(file_of(grey), chunk(b"cICP", bytes((1, transfer, 0, 1)))))
        assert abs(linear(seen) * 203 - light).max() < 4, signal


def test_a_profile_counts_more_than_other_facts() -> None:
    data = file_of(picture(), icc_profile=swapped())
    assert np.array_equal(decode(with_chunk(data, gamma(1.0))), decode(data))
