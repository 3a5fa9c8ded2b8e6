"""Simple scenes with sentences that describe them, and pictures of them, drawn by code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 214, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 210),
    "purple": (136, 60, 180),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
COLOUR_NUMBERS = {name: number for number, name in enumerate(COLOURS)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.115, "medium": 0.18, "large": 0.27}
"""Radius of objects by size, as a share of the picture's shorter side."""

PLACES = {
    (0.5, 0.5): ("in the middle", "in the center", "in the centre"),
    (0.25, 0.5): ("on the left", "on the left side", "at the left"),
    (0.75, 0.5): ("on the right", "on the right side", "at the right"),
    (0.5, 0.25): ("at the top", "near the top"),
    (0.5, 0.75): ("at the bottom", "near the bottom"),
    (0.25, 0.25): ("in the top left corner", "at the top left"),
    (0.75, 0.25): ("in the top right corner", "at the top right"),
    (0.25, 0.75): ("in the bottom left corner", "at the bottom left"),
    (0.75, 0.75): ("in the bottom right corner", "at the bottom right"),
}
"""Phrases for the place of a lone object, by its centre as shares of width and height."""

RELATIONS = {
    (0, -1): ("above", "over", "on top of"),
    (0, 1): ("below", "under", "beneath"),
    (-1, 0): ("left of", "to the left of"),
    (1, 0): ("right of", "to the right of"),
}
"""Phrases for the place of one object relative to another, by the direction across and down."""

APART = 0.25
"""Distance of both centres from the middle in scenes of two objects, as a share of width or height."""

JITTER = 0.045
"""Largest offset of a drawn centre from its place in the sentence."""

CELL = 32
"""Side of the cell that one prior token represents, in pixels."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `x` and `y` are its centre, as shares of width and height."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """Colour and shape of the object, without its size."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, and a sentence that describes them."""

    background: str
    things: tuple[Thing, ...]
    sentence: str


def _object_phrase(thing: Thing, rng: random.Random) -> str:
    if thing.size == "medium" and rng.random() < 0.9:
        return f"a {thing.name}"
    size = {"large": rng.choice(("large", "big"))}.get(thing.size, thing.size)
    return f"a {size} {thing.name}"


def _with_background(what: str, background: str, rng: random.Random) -> str:
    article = "an" if background == "orange" else "a"
    phrase = f"{article} {background} background"
    if rng.random() < 0.12:
        return f"on {phrase}, {what}"
    phrase = rng.choice((*(f"on {phrase}",) * 6, f"against {phrase}", f"with {phrase}", f"on {background}"))
    return f"{what}{rng.choice(('', '', ','))} {phrase}"


def _finish_sentence(sentence: str, rng: random.Random) -> str:
    """Returns the sentence with correct articles, and sometimes with a full stop."""
    sentence = sentence.replace("a orange", "an orange")
    return sentence + rng.choice(("", "", "."))


def random_scene(rng: random.Random) -> Scene:
    """Returns a scene of one or two objects and a sentence about it.

    Details that the sentence omits have defaults: a medium size, the middle, a white background.
    """
    background = "white" if (plain := rng.random() < 0.1) else rng.choice(list(COLOURS))
    others = [colour for colour in COLOURS if colour != background]
    first, second = (
        Thing(rng.choice(SHAPES), rng.choice(others), rng.choice(list(SIZES)), 0.5, 0.5) for _ in range(2)
    )
    if rng.random() < 0.45:
        (x, y), phrases = rng.choice(list(PLACES.items()))
        if first.size == "large" and (x, y) != (0.5, 0.5):
            first = replace(first, size="medium")
        what = _object_phrase(first, rng)
        if (x, y) != (0.5, 0.5) or rng.random() < 0.4:
            what = f"{what} {rng.choice(phrases)}"
        things: tuple[Thing, ...] = (replace(first, x=x, y=y),)
    else:
        (across, down), phrases = rng.choice(list(RELATIONS.items()))
        first, second = (
            replace(thing, size="medium") if thing.size == "large" else thing for thing in (first, second)
        )
        first = replace(first, x=0.5 + APART * across, y=0.5 + APART * down)
        second = replace(second, x=0.5 - APART * across, y=0.5 - APART * down)
        what = f"{_object_phrase(first, rng)} {rng.choice(phrases)} {_object_phrase(second, rng)}"
        things = (first, second)
    sentence = what if plain else _with_background(what, background, rng)
    if rng.random() < 0.1:
        sentence = f"{rng.choice(('a picture of', 'an image of', 'draw', 'paint'))} {sentence}"
    return Scene(background, things, _finish_sentence(sentence, rng))


def shifted(scene: Scene, rng: random.Random) -> Scene:
    """Returns the scene with each object a little away from its place in the sentence."""
    return replace(
        scene,
        things=tuple(
            replace(
                thing,
                x=thing.x + rng.uniform(-JITTER, JITTER),
                y=thing.y + rng.uniform(-JITTER, JITTER),
            )
            for thing in scene.things
        ),
    )


def random_edit(rng: random.Random) -> tuple[Scene, Scene]:
    """Returns a scene before and after an edit. The second scene's sentence requests the edit."""
    while True:
        before = random_scene(rng)
        shapes = [thing.shape for thing in before.things]
        if len(set(shapes)) == len(shapes):  # an object that is named only by its shape must be unique
            break
    used = {before.background, *(thing.colour for thing in before.things)}
    new = rng.choice([colour for colour in COLOURS if colour not in used])
    make = rng.choice(("make", "make", "paint", "turn"))
    if rng.random() < 0.3:
        return before, replace(
            before, background=new, sentence=_finish_sentence(f"{make} the background {new}", rng)
        )
    position = rng.randrange(len(before.things))
    thing = before.things[position]
    called = rng.choice((thing.shape, thing.shape, thing.name))
    things = list(before.things)
    things[position] = replace(thing, colour=new)
    return before, replace(
        before, things=tuple(things), sentence=_finish_sentence(f"{make} the {called} {new}", rng)
    )


@dataclass(frozen=True)
class Drawn:
    """Objects of several scenes, at most one of each scene.

    Attributes:
        scenes: index of each object's scene, shape (objects).
        colours: colour number of each object, shape (objects).
        coverage: share of each pixel that an object covers, shape (objects, height, width).
    """

    scenes: torch.Tensor
    colours: torch.Tensor
    coverage: torch.Tensor


@dataclass(frozen=True)
class Frame:
    """Geometry of drawn pictures.

    Attributes:
        height: height of the pictures in pixels.
        width: width of the pictures in pixels.
        aligned: whether centres are on cell corners and radii are whole or half cells. A shape of a given
            size then consists of the same few cells at any place.
        crop: side of square crops in pixels. None draws whole pictures.
        corners: top and left of each scene's crop.
    """

    height: int
    width: int
    aligned: bool = True
    crop: int | None = None
    corners: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the drawn part."""
        return (self.crop, self.crop) if self.crop else self.size


def objects(scenes: list[Scene], frame: Frame, device: torch.device | str) -> Iterator[Drawn]:
    """Draws the scenes' objects, grouped by shape and by position in their scene."""
    height, width = frame.shape
    rows = torch.arange(height, device=device)[:, None] + 0.5
    columns = torch.arange(width, device=device)[None, :] + 0.5
    groups: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    for line, scene in enumerate(scenes):
        for position, thing in enumerate(scene.things):  # two objects of one scene are in two groups
            groups.setdefault((position, thing.shape), []).append((line, *_geometry(thing, frame, line)))
    numbers = _to_device([one for group in groups.values() for one in group], device)
    for (_, shape), group in zip(
        groups, numbers.split([len(group) for group in groups.values()]), strict=True
    ):
        line, colour, x, y, radius = group[:, :, None, None].unbind(1)
        coverage = (0.5 - _DISTANCES[shape](columns - x, rows - y, radius)).clamp_(0, 1)
        yield Drawn(line.flatten().long(), colour.flatten().long(), coverage)


def _to_device(values: list[Any], device: torch.device | str) -> torch.Tensor:
    """Copies values to a device without waiting for its pending work."""
    return torch.tensor(values).to(device, non_blocking=True)


def _geometry(thing: Thing, frame: Frame, line: int) -> tuple[float, ...]:
    """Returns an object's colour number, and its centre and radius in pixels."""
    x, y = thing.x * frame.width, thing.y * frame.height
    radius = SIZES[thing.size] * min(frame.width, frame.height)
    if frame.aligned:
        x, y, radius = round(x / CELL) * CELL, round(y / CELL) * CELL, round(2 * radius / CELL) * CELL / 2
    top, left = frame.corners[line] if frame.crop else (0, 0)
    return COLOUR_NUMBERS[thing.colour], x - left, y - top, radius


def backgrounds(scenes: list[Scene], device: torch.device | str) -> torch.Tensor:
    """Returns the numbers of the scenes' background colours."""
    return _to_device([COLOUR_NUMBERS[scene.background] for scene in scenes], device)


def draw(scenes: list[Scene], frame: Frame, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns pictures with smooth edges: shape (scenes, 3, height, width), values from -1 to 1."""
    palette = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    pictures = palette[backgrounds(scenes, device)][:, :, None, None].repeat(1, 1, *frame.shape)
    for drawn in objects(scenes, frame, device):
        colour = palette[drawn.colours][:, :, None, None]
        pictures[drawn.scenes] = torch.lerp(pictures[drawn.scenes], colour, drawn.coverage[:, None])
    return pictures


# The next functions return approximate signed distances in pixels from a shape's outline. They are negative
# inside. y grows downwards.


def _circle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - radius


def _square(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - radius


def _triangle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum((2 * x.abs() - y - radius) / math.hypot(1, 2), y - radius)


def _star(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Returns the distance from a star's outline, whose ten parts are the mirrored line from tip to notch."""
    y = y - radius * 0.09  # centres the star's bounding box
    angle = torch.atan2(x, -y)
    folded = (angle + math.pi / 5).remainder(2 * math.pi / 5) - math.pi / 5
    length = torch.hypot(x, y)
    along, beside = length * folded.cos(), length * folded.sin().abs()
    tip, notch = radius * 1.1, radius * 0.46
    notch_along, notch_beside = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    side = torch.hypot(tip - notch_along, notch_beside)
    return ((along - tip) * notch_beside + beside * (tip - notch_along)) / side


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}
