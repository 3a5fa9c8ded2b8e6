"""A judge that recognizes the scene of a picture by simple geometry."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deployments.types import Pixels
from training.demo.scenes import COLOURS, SHAPES, SIZES, Frame, Scene, Thing, draw

SIDE = 128
"""Shorter side in pixels to which pictures are scaled."""
LEAST_AREA = 0.006
"""Minimum area of an object, as a share of the shorter side squared. The smallest shape has 0.017."""
NEAR = 0.125
"""Largest distance of an object from its requested place, as a share of width or height."""
FITTED = 32
"""Side in pixels to which shapes are scaled for comparison."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """Recognized contents of a picture, the largest object first."""

    background: str
    things: tuple[Thing, ...]


def recognize(image: Image.Image) -> Seen:
    """Recognizes a picture's background and objects. An object's centre is that of its bounding box."""
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    small = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.int64)
    nearest = np.abs(small[:, :, None] - np.array(list(COLOURS.values()))).sum(-1).argmin(-1)
    height, width = nearest.shape
    background = _commonest(np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]]))
    things = []
    for spot, colour in _spots(nearest, background):
        rows, columns = np.nonzero(spot)
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        shape = _shape(spot[top:bottom, left:right])
        things.append(
            Thing(
                shape,
                list(COLOURS)[colour],
                _size(shape, spot.sum() / SIDE**2),
                float((left + right) / 2 / width),
                float((top + bottom) / 2 / height),
            )
        )
    return Seen(list(COLOURS)[background], tuple(things))


def marks(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Returns whether a picture is right, by mark.

    The marks other than the background and the count are right only if they are right for all objects.
    """
    left = list(seen.things)
    pairs = []
    for thing in scene.things:
        if left:
            nearest = min(left, key=lambda one: (one.x - thing.x) ** 2 + (one.y - thing.y) ** 2)
            left.remove(nearest)
            pairs.append((thing, nearest))
    found = len(pairs) == len(scene.things)
    return {
        "background": scene.background == seen.background,
        "count": len(scene.things) == len(seen.things),
        "colour": found and all(one.colour == other.colour for one, other in pairs),
        "shape": found and all(one.shape == other.shape for one, other in pairs),
        "place": found
        and all(max(abs(one.x - other.x), abs(one.y - other.y)) < NEAR for one, other in pairs),
        "size": found and all(one.size == other.size for one, other in pairs),
    }


def wrong(scene: Scene, image: Image.Image | Pixels) -> set[str]:
    """Returns the names of the `marks` that a picture of a scene has wrong."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return {what for what, is_right in marks(scene, recognize(picture)).items() if not is_right}


def drawn(scene: Scene, width: int, height: int, *, aligned: bool = True) -> Pixels:
    """Returns the true picture of a scene."""
    picture: torch.Tensor = (draw([scene], Frame(height, width, aligned))[0] + 1) * 127.5
    pixels: Pixels = picture.round().byte().permute(1, 2, 0).numpy()
    return pixels


def _commonest(numbers: NDArray[np.int64]) -> int:
    return int(np.bincount(numbers).argmax())


def _spots(nearest: NDArray[np.int64], background: int) -> list[tuple[Mask, int]]:
    """Returns parts of one colour that are large enough, with the number of the colour, largest first."""
    spots = [
        (part, colour)
        for colour in range(len(COLOURS))
        if colour != background
        for part in _parts(_without_lines(nearest == colour))
    ]
    return sorted(spots, key=lambda spot: -int(spot[0].sum()))


def _around(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Returns the values of each pixel and its four neighbours, with zeros beyond the border."""
    padded = np.pad(values, 1)
    return [values, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _without_lines(mask: Mask) -> Mask:
    """Returns a mask without parts thinner than three pixels. Such parts are edges with mixed colours."""
    core: Mask = np.logical_and.reduce(_around(mask))
    opened: Mask = np.logical_or.reduce(_around(core))
    return opened


def _parts(mask: Mask) -> list[Mask]:
    """Returns the connected parts of a mask that are large enough."""
    numbers = np.arange(mask.size).reshape(mask.shape)
    labels = np.where(mask, numbers, 0)
    while True:  # until all pixels of a part have the number of its last pixel
        spread = np.where(mask, np.maximum.reduce(_around(labels)), 0)
        spread = np.where(mask, spread.ravel()[spread], 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    areas = np.bincount(labels[mask])
    return [labels == label for label in np.nonzero(areas >= LEAST_AREA * SIDE**2)[0] if label]


def _fitted(mask: Mask) -> NDArray[np.float64]:
    """Returns a shape scaled to the size for comparison."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((FITTED, FITTED), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64) / 255


@lru_cache
def _template(shape: str) -> tuple[NDArray[np.float64], float]:
    """Returns a shape scaled for comparison, and its area at radius 1."""
    side = 512
    thing = Thing(shape, "black", "large", 0.5, 0.5)
    mask: Mask = drawn(Scene("white", (thing,), ""), side, side, aligned=False)[:, :, 0] < 128
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return _fitted(box), float(mask.sum()) / (SIZES["large"] * side) ** 2


def _shape(box: Mask) -> str:
    fitted = _fitted(box)
    return min(SHAPES, key=lambda shape: float(np.abs(fitted - _template(shape)[0]).sum()))


def _size(shape: str, area: float) -> str:
    radius = (area / _template(shape)[1]) ** 0.5
    return min(SIZES, key=lambda size: abs(np.log(SIZES[size] / radius)))
