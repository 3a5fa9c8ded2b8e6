"""Colours of source images: converted to sRGB, as a colour-managed viewer shows them."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_PROFILE_BYTES = 2**22
"""Largest colour profile. Those of displays have a few kilobytes, those of printers up to some megabytes."""
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of a profile, by the mode of the picture."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
BT_709 = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""x and y of white, red, green and blue in sRGB, in the order of a PNG's `cHRM`."""
PRIMARIES: Mapping[int, Sequence[float]] = {
    1: BT_709,
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
"""White and primaries by their code points in ITU-T H.273 (table 2): 9 is BT.2020, 12 is Display P3."""
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""Parameters of an ICC profile's curve of type 3: exponent, a, b, c and d."""
BT_709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
TRANSFERS: Mapping[int, Sequence[float]] = {
    **dict.fromkeys((1, 6, 14, 15), BT_709_CURVE),
    4: (2.2,),
    5: (2.8,),
    8: (1,),
    13: SRGB_CURVE,
}
"""Curves from values to light by their code points in ITU-T H.273 (table 3)."""
PQ, HLG = 16, 18
"""Code points of the curves of high dynamic range."""
WHITE_NITS = 203
"""Light of white in pictures of high dynamic range: https://www.itu.int/pub/R-REP-BT.2408."""
HLG_PEAK_NITS = 1000
SRGB_GAMMA = 1 / 2.2
"""Value of `gAMA` with which programs mean sRGB."""
D50 = np.array([0.9642, 1, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
"""Adaptation to another white: https://www.color.org/specification/ICC.1-2022-05.pdf, annex E."""


class UnusableProfileError(ValueError):
    """The colour profile of a picture is broken, too large, or made for other pictures."""


def to_srgb(image: Image.Image, given: Image.Image) -> Image.Image:
    """Returns a picture in sRGB.

    Args:
        image: the picture, with 8 bits a channel.
        given: the picture as it was opened, which says what its numbers mean: by a profile, or else by a
            PNG's `cICP`, `sRGB`, `gAMA` and `cHRM`. Without these, it is in sRGB. In high dynamic range,
            what is brighter than white becomes white.

    Raises:
        UnusableProfileError: what says so cannot be used.
    """
    try:
        profile = _profile_of(given)
        return image if profile is None else _converted(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise UnusableProfileError from error


def _profile_of(given: Image.Image) -> ImageCms.ImageCmsProfile | None:
    facts = given.info
    # Red, green and blue with all values of a byte. A PNG may have nothing else.
    if len(code_points := facts.get("cicp", b"")) == 4 and code_points[2:] == b"\x00\x01":
        return _coded(*code_points[:2])
    if profile := facts.get("icc_profile"):
        if len(profile) > MAX_PROFILE_BYTES:
            raise UnusableProfileError
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in facts or not {"gamma", "chromaticity"} & facts.keys():
        return None
    gamma, points = facts.get("gamma", SRGB_GAMMA), facts.get("chromaticity", BT_709)
    is_usual = abs(gamma - SRGB_GAMMA) < 0.01
    if is_usual and np.allclose(points, BT_709, atol=0.002):
        return None
    return _display(points, _parametric(SRGB_CURVE if is_usual else (1 / gamma,)))


def _coded(primaries: int, transfer: int) -> ImageCms.ImageCmsProfile | None:
    """Returns the profile of code points in ITU-T H.273; None for sRGB and for unknown ones."""
    points, curve = PRIMARIES.get(primaries), TRANSFERS.get(transfer)
    if points is None or (points is BT_709 and curve is SRGB_CURVE):
        return None
    if transfer in (PQ, HLG):
        return _display(points, _sampled(_nits(transfer) / WHITE_NITS))
    return _display(points, _parametric(curve)) if curve else None


def _nits(transfer: int) -> NDArray[np.float64]:
    """Returns the light of each value of a byte in high dynamic range.

    https://www.itu.int/rec/R-REC-BT.2100, tables 4 and 5. For HLG, the system's gamma is applied to each
    channel.
    """
    values = np.arange(256) / 255
    if transfer == PQ:
        power = values ** (32 / 2523)
        light: NDArray[np.float64] = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
        return 10_000 * light ** (16384 / 2610)
    upper = (np.exp((values - 0.55991073) / 0.17883277) + 0.28466892) / 12
    scene = np.where(values <= 0.5, values**2 / 3, upper)
    nits: NDArray[np.float64] = HLG_PEAK_NITS * scene**1.2
    return nits


def _display(points: Sequence[float], curve: bytes) -> ImageCms.ImageCmsProfile:
    """Returns the profile of a display by its white, its primaries and the curve of its profile."""
    return ImageCms.ImageCmsProfile(io.BytesIO(_matrix_profile(points, curve)))


def _parametric(parameters: Sequence[float]) -> bytes:
    """Returns a curve of an ICC profile by its parameters: an exponent alone, or those of type 3."""
    return b"para" + struct.pack(">IHH", 0, 0 if len(parameters) == 1 else 3, 0) + _fixed(parameters)


def _sampled(light: NDArray[np.float64]) -> bytes:
    """Returns a curve of an ICC profile by its values, of which 1 is white."""
    numbers = np.round(np.minimum(light, 1) * 65_535).astype(">u2")
    return b"curv" + struct.pack(">II", 0, len(numbers)) + numbers.tobytes()


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and colours.mode in ("1", "L", "P"):
        colours = colours.convert("RGB")
    if SPACES.get(colours.mode) != space:
        raise UnusableProfileError
    intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
    converted = ImageCms.profileToProfile(colours, profile, SRGB, renderingIntent=intent, outputMode="RGB")
    if converted is None:
        raise UnusableProfileError
    if alpha:
        converted.putalpha(alpha)
    return converted


def _matrix_profile(points: Sequence[float], curve: bytes) -> bytes:
    """Returns an ICC profile of version 4: https://www.color.org/specification/ICC.1-2022-05.pdf.

    Args:
        points: x and y of white, red, green and blue.
        curve: curve by which values become light, as an element of the profile.

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
    tags = {
        "desc": b"mluc" + bytes(4) + struct.pack(">II", 0, 12),
        "wtpt": _xyz(D50),
        **{f"{name}XYZ": _xyz(matrix[:, at]) for at, name in enumerate("rgb")},
        **{f"{name}TRC": curve for name in "rgb"},
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
