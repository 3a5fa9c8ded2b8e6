"""Simple scenes: what they are, the sentences that describe them, and their pictures, drawn by code."""

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
"""Radius, as a share of the picture's shorter side."""

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
"""Of a lone object: where its centre is, as shares of width and height, and how one says so."""

RELATIONS = {
    (0, -1): ("above", "over", "on top of"),
    (0, 1): ("below", "under", "beneath"),
    (-1, 0): ("left of", "to the left of"),
    (1, 0): ("right of", "to the right of"),
}
"""Of two objects: on which side of the second the first is, and how one says so."""

APART = 0.25
"""Of two objects: how far from the middle each centre is, as a share of width or height."""

JITTER = 0.045
"""Centres are drawn that far from where a sentence puts them, at most."""

CELL = 32
"""Pixels a side of what one prior token stands for."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `x`, `y` are its centre, as shares of width and height."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """Without its size."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, and a sentence that describes them."""

    background: str
    things: tuple[Thing, ...]
    sentence: str


def _mentioned(thing: Thing, chance: random.Random) -> str:
    if thing.size == "medium" and chance.random() < 0.9:
        return f"a {thing.name}"
    size = {"large": chance.choice(("large", "big"))}.get(thing.size, thing.size)
    return f"a {size} {thing.name}"


def _on_a_background(what: str, background: str, chance: random.Random) -> str:
    article = "an" if background == "orange" else "a"
    phrase = f"{article} {background} background"
    if chance.random() < 0.12:
        return f"on {phrase}, {what}"
    phrase = chance.choice(
        (*(f"on {phrase}",) * 6, f"against {phrase}", f"with {phrase}", f"on {background}")
    )
    return f"{what}{chance.choice(('', '', ','))} {phrase}"


def _typed(sentence: str, chance: random.Random) -> str:
    """As people type: with a full stop after it or without, and the right article."""
    sentence = sentence.replace("a orange", "an orange")
    return sentence + chance.choice(("", "", "."))


def random_scene(chance: random.Random) -> Scene:
    """One or two objects and a sentence about them.

    What a sentence leaves out is as usual: a medium size, the middle, a white background.
    """
    background = "white" if (plain := chance.random() < 0.1) else chance.choice(list(COLOURS))
    others = [colour for colour in COLOURS if colour != background]
    first, second = (
        Thing(chance.choice(SHAPES), chance.choice(others), chance.choice(list(SIZES)), 0.5, 0.5)
        for _ in range(2)
    )
    if chance.random() < 0.45:
        (x, y), phrases = chance.choice(list(PLACES.items()))
        if first.size == "large" and (x, y) != (0.5, 0.5):
            first = replace(first, size="medium")
        what = _mentioned(first, chance)
        if (x, y) != (0.5, 0.5) or chance.random() < 0.4:
            what = f"{what} {chance.choice(phrases)}"
        things: tuple[Thing, ...] = (replace(first, x=x, y=y),)
    else:
        (across, down), phrases = chance.choice(list(RELATIONS.items()))
        first, second = (
            replace(thing, size="medium") if thing.size == "large" else thing for thing in (first, second)
        )
        first = replace(first, x=0.5 + APART * across, y=0.5 + APART * down)
        second = replace(second, x=0.5 - APART * across, y=0.5 - APART * down)
        what = f"{_mentioned(first, chance)} {chance.choice(phrases)} {_mentioned(second, chance)}"
        things = (first, second)
    sentence = what if plain else _on_a_background(what, background, chance)
    if chance.random() < 0.1:
        sentence = f"{chance.choice(('a picture of', 'an image of', 'draw', 'paint'))} {sentence}"
    return Scene(background, things, _typed(sentence, chance))


def shifted(scene: Scene, chance: random.Random) -> Scene:
    """The same, each object a little away from where the sentence puts it."""
    return replace(
        scene,
        things=tuple(
            replace(
                thing,
                x=thing.x + chance.uniform(-JITTER, JITTER),
                y=thing.y + chance.uniform(-JITTER, JITTER),
            )
            for thing in scene.things
        ),
    )


def random_edit(chance: random.Random) -> tuple[Scene, Scene]:
    """A scene, and the same one after what the second's sentence asks for has been done."""
    while True:
        before = random_scene(chance)
        shapes = [thing.shape for thing in before.things]
        if len(set(shapes)) == len(shapes):  # one that is named by its shape alone must be the only one
            break
    used = {before.background, *(thing.colour for thing in before.things)}
    new = chance.choice([colour for colour in COLOURS if colour not in used])
    make = chance.choice(("make", "make", "paint", "turn"))
    if chance.random() < 0.3:
        return before, replace(
            before, background=new, sentence=_typed(f"{make} the background {new}", chance)
        )
    position = chance.randrange(len(before.things))
    thing = before.things[position]
    called = chance.choice((thing.shape, thing.shape, thing.name))
    things = list(before.things)
    things[position] = replace(thing, colour=new)
    return before, replace(
        before, things=tuple(things), sentence=_typed(f"{make} the {called} {new}", chance)
    )


@dataclass(frozen=True)
class Drawn:
    """Some objects, one of a scene each.

    Attributes:
        scenes: which scenes', shape (objects).
        colours: theirs, shape (objects).
        coverage: share of each pixel that they cover, shape (objects, height, width).
    """

    scenes: torch.Tensor
    colours: torch.Tensor
    coverage: torch.Tensor


@dataclass(frozen=True)
class Frame:
    """How scenes are drawn.

    Attributes:
        height: of the pictures, in pixels.
        width: likewise.
        aligned: whether centres lie where cells meet, and radii are whole or half cells: a shape of a size is
            made of the same few cells then, wherever it is.
        crop: the side of squares that are cut out, if not all is drawn.
        corners: of these, top and left of each scene's.
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
        """Height and width of what is drawn."""
        return (self.crop, self.crop) if self.crop else self.size


def objects(scenes: list[Scene], frame: Frame, device: torch.device | str) -> Iterator[Drawn]:
    """Draw the scenes' objects, one after the other."""
    height, width = frame.shape
    rows = torch.arange(height, device=device)[:, None] + 0.5
    columns = torch.arange(width, device=device)[None, :] + 0.5
    groups: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    for line, scene in enumerate(scenes):
        for position, thing in enumerate(scene.things):  # two of one scene are in two groups
            groups.setdefault((position, thing.shape), []).append((line, *_measures(thing, frame, line)))
    numbers = _moved([one for group in groups.values() for one in group], device)
    for (_, shape), group in zip(
        groups, numbers.split([len(group) for group in groups.values()]), strict=True
    ):
        line, colour, x, y, radius = group[:, :, None, None].unbind(1)
        coverage = (0.5 - _DISTANCES[shape](columns - x, rows - y, radius)).clamp_(0, 1)
        yield Drawn(line.flatten().long(), colour.flatten().long(), coverage)


def _moved(values: list[Any], device: torch.device | str) -> torch.Tensor:
    """Values on a device, without waiting for what it still has to do."""
    return torch.tensor(values).to(device, non_blocking=True)


def _measures(thing: Thing, frame: Frame, line: int) -> tuple[float, ...]:
    """Its colour's number, and its centre and radius in pixels."""
    x, y = thing.x * frame.width, thing.y * frame.height
    radius = SIZES[thing.size] * min(frame.width, frame.height)
    if frame.aligned:
        x, y, radius = round(x / CELL) * CELL, round(y / CELL) * CELL, round(2 * radius / CELL) * CELL / 2
    top, left = frame.corners[line] if frame.crop else (0, 0)
    return COLOUR_NUMBERS[thing.colour], x - left, y - top, radius


def backgrounds(scenes: list[Scene], device: torch.device | str) -> torch.Tensor:
    """Numbers of their colours."""
    return _moved([COLOUR_NUMBERS[scene.background] for scene in scenes], device)


def draw(scenes: list[Scene], frame: Frame, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pictures of shape (scenes, 3, height, width), values from -1 to 1, with smooth edges."""
    palette = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    pictures = palette[backgrounds(scenes, device)][:, :, None, None].repeat(1, 1, *frame.shape)
    for drawn in objects(scenes, frame, device):
        colour = palette[drawn.colours][:, :, None, None]
        pictures[drawn.scenes] = torch.lerp(pictures[drawn.scenes], colour, drawn.coverage[:, None])
    return pictures


# Signed distances in pixels from a shape's outline, about, negative inside; y grows downwards.


def _circle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - radius


def _square(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - radius


def _triangle(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    return torch.maximum((2 * x.abs() - y - radius) / math.hypot(1, 2), y - radius)


def _star(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Its outline from a tip to the next notch, mirrored and turned into all ten such parts."""
    y = y - radius * 0.09  # its box is in the middle then
    angle = torch.atan2(x, -y)
    folded = (angle + math.pi / 5).remainder(2 * math.pi / 5) - math.pi / 5
    length = torch.hypot(x, y)
    along, beside = length * folded.cos(), length * folded.sin().abs()
    tip, notch = radius * 1.1, radius * 0.46
    notch_along, notch_beside = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    side = torch.hypot(tip - notch_along, notch_beside)
    return ((along - tip) * notch_beside + beside * (tip - notch_along)) / side


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}
