"""Images at the edge: bounded decoding of source images, encoding of results."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageOps

from serve_app.errors import InvalidParameter
from serve_app.generation import containers
from serve_app.generation.colour import UnusableProfileError, to_srgb

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.families import Family
    from deployments.types import Pixels
    from serve_app.generation.request import Encoding

# Sides are checked before anything is decoded; Pillow would only warn, and of smaller images.
Image.MAX_IMAGE_PIXELS = None

MIN_SOURCE_SIDE = 16
JPEG_SCALES: tuple[int, ...] = (1, 2, 4)
"""Divisors by which a JPEG can be made smaller while it is decoded."""
MAX_BUFFERED = 2
"""Most pixels of a JPEG with several scans, as a multiple of `max_pixels`. The decoder holds all of it."""
BROKEN = "is broken or incomplete; save it anew"
PNG_LEVEL = 4
"""Compression level of zlib. Files are as large as at the usual level 6 (98-104 % for three kinds of
1024×1024 pictures), and encoding takes 86, 55 and 32 % of the time."""
MAX_PADDED_SIDE = 8192
"""Longest side of an image that is padded at its own size."""
BACKGROUND = (255, 255, 255)
"""White: shows behind transparency, and beside a source that is too long for the model."""


def decode_source(
    data: bytes,
    family: Family,
    max_pixels: int,
    max_side: int,
    note: Callable[[str], None] = lambda _: None,
) -> Pixels:
    """Decodes a source image into pixels that both stages take as they are.

    The image is turned upright by its EXIF orientation, converted to sRGB, flattened onto white, padded with
    white to the family's widest aspect, and scaled to a legal size (see `legal_size`). A legal opaque image
    in sRGB keeps its pixels. A JPEG of more than `max_pixels` is decoded at a fraction of its size.

    Args:
        data: the file.
        family: the family of the model.
        max_pixels: most pixels that are decoded.
        max_side: longest side, in pixels.
        note: takes what the client should know about the image.

    Raises:
        InvalidParameter: not a PNG, JPEG or WebP image, broken, animated, of more than `max_pixels`, in more
            parts than an image needs, or a side not from 16 to `max_side` pixels.
    """
    try:
        has_profile = containers.has_png_profile(data)
        data = containers.picture(data)
    except containers.TooManyPartsError:
        raise _bad_source("has more parts than an image needs; save it anew") from None
    except ValueError as error:
        raise _bad_source(BROKEN) from error
    image = _opened(data)
    if not all(MIN_SOURCE_SIDE <= side <= max_side for side in image.size):
        raise _bad_source(
            f"is {image.width}x{image.height}; each side must be {MIN_SOURCE_SIDE}-{max_side} pixels"
        )
    scale = _scale(image, data, max_pixels)
    # MPO, a camera's JPEG with a second picture in it, counts as animated; its first frame is meant.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _bad_source("is animated; send a single frame")
    try:
        image = _loaded(image, scale) if containers.has_end(data) else _without_end(data, scale)
        picture = _shallow(_upright(image))
        is_unusable = has_profile and not {"icc_profile", "cicp"} & image.info.keys()
        try:
            picture = to_srgb(picture, image)
        except UnusableProfileError:
            is_unusable = True
        if is_unusable:
            note("has a colour profile that cannot be used, and is taken as sRGB")
        return np.asarray(_fit(_flatten(picture), family))
    except Exception as error:
        raise _bad_source(BROKEN) from error


def _opened(data: bytes) -> Image.Image:
    """Returns an image of which only the header was read."""
    try:
        # The first bytes decide, not the declared type; no other of Pillow's decoders is reachable.
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except Exception as error:  # Pillow's errors for broken files are of many kinds
        raise _bad_source(
            "cannot be read; save it anew"
            if containers.is_image(data)
            else "is not a PNG, JPEG or WebP image; convert it into one"
        ) from error
    if code_points := containers.code_points(data):  # Pillow does not read them
        image.info["cicp"] = code_points
    return image


def _scale(image: Image.Image, data: bytes, max_pixels: int) -> int:
    """Returns the divisor of an image's sides at which to decode it. Only a JPEG may have one above 1.

    Raises:
        InvalidParameter: it is too large all the same.
    """
    pixels = image.width * image.height
    scales: tuple[int, ...] = (1,)
    if image.format in ("JPEG", "MPO") and pixels > max_pixels:
        is_small = pixels <= MAX_BUFFERED * max_pixels
        if is_small or not ("progressive" in image.info or containers.has_several_scans(data)):
            scales = JPEG_SCALES
    for scale in scales:
        width, height = (-(-side // scale) for side in image.size)
        if width * height <= max_pixels:
            return scale
    raise _bad_source(
        f"is {image.width}x{image.height}; at most {max_pixels} pixels are allowed: send a smaller one"
    )


def _loaded(image: Image.Image, scale: int) -> Image.Image:
    """Returns an image, decoded at a fraction of its size.

    Raises:
        ValueError: it cannot be decoded at that fraction.
    """
    expected = tuple(-(-side // scale) for side in image.size)
    image.draft(None, (image.width // scale, image.height // scale))
    if image.size != expected:
        raise ValueError("it cannot be decoded at a fraction of its size")
    image.load()
    return image


def _without_end(data: bytes, scale: int) -> Image.Image:
    """Returns a JPEG that lacks its end marker, decoded, if it has all its pixels.

    Pixels that are missing depend on the bytes that follow the data.

    Raises:
        ValueError: pixels are missing.
    """
    data = data.rstrip(b"\xff")  # half of the marker
    first, second = (
        _loaded(_opened(data + following + containers.JPEG_END), scale) for following in (b"", b"\xaa" * 4096)
    )
    if ImageChops.difference(first, second).getbbox(alpha_only=False):
        raise ValueError("pixels are missing")
    return first


def legal_size(width: int, height: int, family: Family) -> tuple[int, int]:
    """Returns the legal size nearest to a given one.

    It is scaled into the family's range, and its sides are rounded to the family's multiple. Rounding may
    change the aspect, and the range limits it.
    """
    shorter, longer = sorted((width, height))
    scale = 1.0
    if shorter < family.min_side:
        scale = family.min_side / shorter
    if longer * scale > family.max_side:
        scale = family.max_side / longer
    legal = [round(side * scale / family.side_multiple) * family.side_multiple for side in (width, height)]
    legal_width, legal_height = (min(max(side, family.min_side), family.max_side) for side in legal)
    return legal_width, legal_height


def cropped(pixels: Pixels, width: int, height: int) -> Pixels:
    """Returns the middle of an image, which is at least as large."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def encode(pixels: Pixels, encoding: Encoding) -> bytes:
    """Returns the image as a file."""
    file = io.BytesIO()
    options = {
        "png": {"compress_level": PNG_LEVEL},
        "jpeg": {"quality": max(encoding.quality, 1)},
        "webp": {"quality": encoding.quality},
    }[encoding.format]
    Image.fromarray(pixels).save(file, encoding.format, **options)
    return file.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image as its EXIF orientation says. Broken EXIF data are ignored."""
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _shallow(image: Image.Image) -> Image.Image:
    """Returns the image with 8 bits a channel. Pillow's own conversion of 16 bits would clip them."""
    if not image.mode.startswith("I;16"):
        return image.convert("RGBA") if "transparency" in image.info else image
    deep = np.asarray(image)
    shallow = Image.fromarray((deep >> 8).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        shallow.putalpha(Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8)))
    return shallow


def _flatten(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, BACKGROUND)
        background.alpha_composite(image)
        image = background
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _fit(image: Image.Image, family: Family) -> Image.Image:
    if max(image.size) > MAX_PADDED_SIDE:  # first, since padding makes a long image large
        image = ImageOps.contain(image, (MAX_PADDED_SIDE, MAX_PADDED_SIDE), Image.Resampling.LANCZOS)
    least = -(-max(image.size) // family.max_aspect)  # rounded up
    padded = (max(image.width, least), max(image.height, least))
    if padded != image.size:
        image = ImageOps.pad(image, padded, color=BACKGROUND)
    size = legal_size(*image.size, family)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _bad_source(problem: str) -> InvalidParameter:
    return InvalidParameter("sources", problem, code="invalid_image")
