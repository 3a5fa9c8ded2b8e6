"""Colours of source images: converted to sRGB, as a colour-managed viewer shows them."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_PROFILE_BYTES = 2**22
"""Largest colour profile. Those of displays have a few kilobytes, those of printers up to some megabytes."""
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of a profile, by the mode of the picture."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
BT_709 = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""x and y of white, red, green and blue in sRGB, in the order of a PNG's `cHRM`."""
SRGB_GAMMA = 1 / 2.2
"""Value of `gAMA` with which programs mean sRGB."""
D50 = np.array([0.9642, 1, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
"""Adaptation to another white: https://www.color.org/specification/ICC.1-2022-05.pdf, annex E."""


def to_srgb(image: Image.Image, given: Image.Image) -> Image.Image:
    """Returns a picture in sRGB.

    Args:
        image: the picture, with 8 bits a channel.
        given: the picture as it was opened, which says what its numbers mean: by a profile, or else by a
            PNG's `sRGB`, `gAMA` and `cHRM`. Without these, it is in sRGB. What is broken is ignored.
    """
    try:
        profile = _profile_of(given)
        return image if profile is None else _converted(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, ArithmeticError, np.linalg.LinAlgError):
        return image


def _profile_of(given: Image.Image) -> ImageCms.ImageCmsProfile | None:
    facts = given.info
    if profile := facts.get("icc_profile"):
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)) if len(profile) <= MAX_PROFILE_BYTES else None
    if "srgb" in facts or not {"gamma", "chromaticity"} & facts.keys():
        return None
    gamma, points = facts.get("gamma", SRGB_GAMMA), facts.get("chromaticity", BT_709)
    is_usual = abs(gamma - SRGB_GAMMA) < 0.01
    if is_usual and np.allclose(points, BT_709, atol=0.002):
        return None
    return ImageCms.ImageCmsProfile(io.BytesIO(_matrix_profile(points, None if is_usual else 1 / gamma)))


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and colours.mode in ("1", "L", "P"):
        colours = colours.convert("RGB")
    if SPACES.get(colours.mode) != space:
        return image
    intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
    converted = ImageCms.profileToProfile(colours, profile, SRGB, renderingIntent=intent, outputMode="RGB")
    if converted is None:
        return image
    if alpha:
        converted.putalpha(alpha)
    return converted


def _matrix_profile(points: Sequence[float], exponent: float | None) -> bytes:
    """Returns an ICC profile of version 4: https://www.color.org/specification/ICC.1-2022-05.pdf.

    Args:
        points: x and y of white, red, green and blue.
        exponent: exponent by which values become light; None for the curve of sRGB.

    Raises:
        ValueError: these are not the chromaticities of a display.
    """
    white, *primaries = (
        np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(points[::2], points[1::2], strict=True)
    )
    columns = np.stack(primaries, axis=1)
    matrix = _adaptation(white) @ (columns * np.linalg.solve(columns, white))
    if not np.isfinite(matrix).all() or abs(matrix).max() > 4:
        raise ValueError("these are not the chromaticities of a display")
    curve = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045] if exponent is None else [exponent]
    kind = 3 if exponent is None else 0
    tags = {
        "desc": b"mluc" + bytes(4) + struct.pack(">II", 0, 12),
        "wtpt": _xyz(D50),
        **{f"{name}XYZ": _xyz(matrix[:, at]) for at, name in enumerate("rgb")},
        **{f"{name}TRC": b"para" + struct.pack(">IHH", 0, kind, 0) + _fixed(curve) for name in "rgb"},
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(24) + struct.pack(">I", 1) + _fixed(D50)
    return header.ljust(128, b"\0") + table + body


def _adaptation(white: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the matrix that adapts colours under a white to D50."""
    scale = (BRADFORD @ D50) / (BRADFORD @ white)
    adaptation: NDArray[np.float64] = np.linalg.inv(BRADFORD) @ (scale[:, None] * BRADFORD)
    return adaptation


def _fixed(values: Sequence[float] | NDArray[np.float64]) -> bytes:
    """Returns numbers with 16 bits after the point."""
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)
