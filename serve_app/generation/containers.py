"""The containers of source images. Metadata and trailing data are removed before decoding.

They are often large, sometimes broken, and never needed. So no picture is rejected because of them.
"""

from __future__ import annotations

import re
import zlib
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
USED_CHUNKS = (b"tRNS", b"eXIf", b"acTL", b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
"""Ancillary chunks that say how to show the pixels: https://www.w3.org/TR/png-3/#4Concepts.FormatChunks."""
MAX_CHUNK_BYTES = 2**20
"""Largest ancillary chunk, unpacked. Pillow rejects a picture with a larger one."""
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
SCAN = b"\xda"
"""Second byte of the marker that begins a scan."""
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Marker that ends a scan: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, B.1.1."""
MAX_SCANS = 100
"""Most scans of a JPEG. Progressive files have about ten."""
MAX_PARTS = 20_000
"""Most markers of a JPEG, or chunks of a PNG. Some encoders write chunks of 4 KiB, so 80 MB are allowed."""


class TooManyPartsError(ValueError):
    """A file has more parts than an image needs, and would keep a decoder busy."""


def is_image(data: bytes | bytearray) -> bool:
    """Returns whether the first bytes are those of a PNG, JPEG or WebP image."""
    return data.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")) or (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    )


def picture(data: bytes) -> bytes:
    """Returns the picture of a file: a JPEG to its end marker, a PNG without chunks that are not needed.

    Raises:
        TooManyPartsError: it has too many parts.
        ValueError: a PNG's pixels have a wrong checksum.
    """
    if data.startswith(JPEG_START):
        end = _jpeg_end(data)
        return data if end is None else data[:end]
    if data.startswith(PNG_SIGNATURE):
        return PNG_SIGNATURE + b"".join(_needed_chunks(data))
    return data


def code_points(data: bytes) -> bytes | None:
    """Returns the content of a PNG's `cICP` chunk: code points of ITU-T H.273. None without one."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    head = takewhile(lambda chunk: chunk[4:8] != b"IDAT", _needed_chunks(data))
    return next((chunk[8:-4] for chunk in head if chunk[4:8] == b"cICP"), None)


def has_png_profile(data: bytes) -> bool:
    """Returns whether a file is a PNG with a colour profile, which may be broken or too large to be kept."""
    return data.startswith(PNG_SIGNATURE) and any(kind == b"iCCP" for kind, _ in _chunks(data))


def has_end(data: bytes) -> bool:
    """Returns whether a picture has all parts of its container. A JPEG may lack its end marker."""
    return not data.startswith(JPEG_START) or data.endswith(JPEG_END)


def has_several_scans(jpeg: bytes) -> bool:
    """Returns whether a JPEG has several scans, so that a decoder must hold the whole image."""
    return sum(marker == SCAN for marker, _ in _markers(jpeg)) > 1


def _jpeg_end(data: bytes) -> int | None:
    """Returns the offset behind the end marker of the first picture; None without one."""
    scans = 0
    for parts, (marker, at) in enumerate(_markers(data)):
        scans += marker == SCAN
        if scans > MAX_SCANS or parts >= MAX_PARTS:
            raise TooManyPartsError
        if marker == JPEG_END[1:]:
            return at + 2
    return None


def _markers(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the second byte and the offset of each marker of a JPEG's first picture."""
    at = len(JPEG_START)
    while (at := data.find(b"\xff", at)) >= 0 and (marker := data[at + 1 : at + 2]):
        yield marker, at
        if marker == JPEG_END[1:]:
            return
        if marker == b"\xff":  # fill bytes may precede a marker
            at += 1
        elif marker[0] in range(0xD0, 0xD9) or marker[0] < 2:  # these have no content
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
        if marker == SCAN:
            following = AFTER_SCAN.search(data, at)
            if following is None:
                return
            at = following.start()


def _needed_chunks(data: bytes) -> Iterator[bytes]:
    """Yields the chunks of a PNG to its end, without ancillary ones that are unused, broken or large."""
    for kind, chunk in _chunks(data):
        if kind in PIXEL_CHUNKS:
            if not _has_checksum(chunk):  # Pillow does not look
                raise ValueError("the pixels have a wrong checksum")
            yield chunk
        elif kind in USED_CHUNKS and _is_small(chunk) and _has_checksum(chunk):
            yield chunk


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the kind of each chunk of a PNG to its end, and the chunk itself."""
    at = len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        if at >= len(data):
            return
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        yield kind, data[at:end]
        if kind == b"IEND":
            return
        at = end
    raise TooManyPartsError


def _has_checksum(chunk: bytes) -> bool:
    return zlib.crc32(memoryview(chunk)[4:-4]) == int.from_bytes(chunk[-4:])


def _is_small(chunk: bytes) -> bool:
    """Returns whether a chunk is small, unpacked if it is packed."""
    if chunk[4:8] != b"iCCP":
        return len(chunk) <= MAX_CHUNK_BYTES
    _, _, compressed = chunk[8:-4].partition(b"\0")
    try:
        return len(zlib.decompressobj().decompress(compressed[1:], MAX_CHUNK_BYTES + 1)) <= MAX_CHUNK_BYTES
    except zlib.error:
        return False
