"""Images at the edge: bounded decoding of source images, encoding of results."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from serve_app.errors import InvalidParameter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.families import Family
    from deployments.types import Pixels
    from serve_app.generation.request import Encoding

# Sides are checked before anything is decoded; Pillow would only warn, and of smaller images.
Image.MAX_IMAGE_PIXELS = None

MIN_SOURCE_SIDE = 16
MAX_SOURCE_SIDE = 8192
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_MARKER = re.compile(rb"\xff[\xc4\xdb\xdd\xe0-\xef\xfe]")
"""Start of a table, of application data, or of a comment."""
MAX_SCANS = 100
"""Most scans of a JPEG, those of embedded pictures included. Progressive files have about ten."""
MAX_PARTS = 20_000
"""Most markers of a JPEG, or chunks of a PNG. Some encoders write chunks of 4 KiB, so 80 MB are allowed."""
PNG_LEVEL = 4
"""Compression level of zlib. Files are as large as at the usual level 6 (98-104 % for three kinds of
1024×1024 pictures), and encoding takes 86, 55 and 32 % of the time."""
BACKGROUND = (255, 255, 255)
"""White: shows behind transparency, and beside a source that is too long for the model."""


def decode_source(data: bytes, family: Family, max_pixels: int) -> Pixels:
    """Decodes a source image into pixels that both stages take as they are.

    The image is turned upright by its EXIF orientation, flattened onto white, padded with white to the
    family's widest aspect, and scaled to a legal size (see `legal_size`). A legal opaque image keeps its
    pixels.

    Raises:
        InvalidParameter: not a PNG, JPEG or WebP image, broken, animated, of more than `max_pixels`, in more
            parts than an image needs, or a side not in 16-8192 pixels.
    """
    if _is_laborious(data):
        raise _bad_source("has more parts than an image needs; save it anew")
    try:
        # The first bytes decide, not the declared type; no other of Pillow's decoders is reachable.
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except Exception as error:  # Pillow's errors for broken files are of many kinds
        raise _bad_source("is not a PNG, JPEG or WebP image") from error
    if not all(MIN_SOURCE_SIDE <= side <= MAX_SOURCE_SIDE for side in image.size):
        raise _bad_source(
            f"is {image.width}x{image.height}; each side must be {MIN_SOURCE_SIDE}-{MAX_SOURCE_SIDE} pixels"
        )
    if image.width * image.height > max_pixels:
        raise _bad_source(
            f"is {image.width}x{image.height}; at most {max_pixels} pixels are allowed: send a smaller one"
        )
    # MPO, a camera's JPEG with a second picture in it, counts as animated; its first frame is meant.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _bad_source("is animated; send a single frame")
    try:
        image.load()
        return np.asarray(_fit(_flatten(_upright(image)), family))
    except Exception as error:
        raise _bad_source("is broken or incomplete") from error


def is_image(data: bytes | bytearray) -> bool:
    """Returns whether the first bytes are those of a PNG, JPEG or WebP image."""
    return data.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")) or (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    )


def _is_laborious(data: bytes) -> bool:
    """Returns whether a file would keep a decoder busy: each scan of a JPEG covers the whole image."""
    if data.startswith(b"\xff\xd8"):
        return data.count(b"\xff\xda") > MAX_SCANS or _has_more(JPEG_MARKER.finditer(data))
    if data.startswith(PNG_SIGNATURE):
        return _has_more(_png_chunks(data))
    return False


def _has_more(parts: Iterator[object]) -> bool:
    return next(islice(parts, MAX_PARTS, None), None) is not None


def _png_chunks(data: bytes) -> Iterator[int]:
    """Yields the offset of each chunk."""
    at = len(PNG_SIGNATURE)
    while at < len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4])


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


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        deep = np.asarray(image)
        shallow = (deep >> 8).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            shallow[deep == transparent] = BACKGROUND[0]
        return Image.fromarray(shallow).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, BACKGROUND)
        background.alpha_composite(image)
        image = background
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _fit(image: Image.Image, family: Family) -> Image.Image:
    least = -(-max(image.size) // family.max_aspect)  # rounded up
    padded = (max(image.width, least), max(image.height, least))
    if padded != image.size:
        image = ImageOps.pad(image, padded, color=BACKGROUND)
    size = legal_size(*image.size, family)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _bad_source(problem: str) -> InvalidParameter:
    return InvalidParameter("sources", problem, code="invalid_image")
