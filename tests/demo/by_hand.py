"""Sentences written by hand, and what their pictures must show. `sentences.txt` explains the notation."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from PIL import Image

from deployments.types import Pixels
from tests.demo.judge import NEAR, Seen, recognize
from training.demo.scenes import COLOURS, SHAPES, SIZES, Thing

FILE = Path(__file__).with_name("sentences.txt")
UNSEEN = Path(__file__).with_name("unseen.txt")
"""Sentences that were not used to write the tokenizer's rules."""
PLACES = {
    "middle": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "top-left": (0.25, 0.25),
    "top-right": (0.75, 0.25),
    "bottom-left": (0.25, 0.75),
    "bottom-right": (0.75, 0.75),
}
"""Centres of demanded places, as shares of width and height."""
LEAST_APART = 0.25
"""Minimum distance of two related centres. The demo was trained to keep 0.5, give or take 0.1."""
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "above": lambda across, down: down >= max(LEAST_APART, abs(across)),
    "below": lambda across, down: -down >= max(LEAST_APART, abs(across)),
    "left-of": lambda across, down: across >= max(LEAST_APART, abs(down)),
    "right-of": lambda across, down: -across >= max(LEAST_APART, abs(down)),
    "beside": lambda across, down: abs(across) >= max(LEAST_APART, abs(down)),
    "and": lambda across, down: True,
}
"""Whether the way from the first to the second centre satisfies a relation."""


@dataclass(frozen=True)
class Wanted:
    """One object that a picture must show. None leaves something open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: tuple[float, float] | None = None


@dataclass(frozen=True)
class Wish:
    """A sentence, and what its picture must show. None leaves something open."""

    sentence: str
    things: tuple[Wanted, ...]
    relation: str | None = None
    background: str | None = None


def wishes(file: Path = FILE) -> list[Wish]:
    """Returns the wishes of a file."""
    lines = file.read_text().splitlines()
    return [parse(line) for line in lines if line and not line.startswith("#")]


def parse(line: str) -> Wish:
    """Parses a line.

    Raises:
        ValueError: the line is not in the notation.
    """
    sentence, *parts = (part.strip() for part in line.split(" |"))
    if not sentence or len(parts) not in (1, 2) or not set(parts[1:]) <= COLOURS.keys():
        raise ValueError(f"{line!r} is not a line of SENTENCE | OBJECTS [| BACKGROUND]")
    words = parts[0].split()
    at = next((position for position, word in enumerate(words) if word in RELATIONS), None)
    if at is None:
        return Wish(sentence, (_wanted(words),), None, *parts[1:])
    return Wish(sentence, (_wanted(words[:at]), _wanted(words[at + 1 :])), words[at], *parts[1:])


def _wanted(words: list[str]) -> Wanted:
    """Returns the object of words in the order size, colour, shape, place."""
    left = list(words)
    size = left.pop(0) if left and left[0] in SIZES else None
    colour = left.pop(0) if left and left[0] in COLOURS else None
    shape = left.pop(0) if left else ""
    place = left.pop(0) if left and left[0].startswith("@") else None
    if shape not in SHAPES or left or not (place is None or place[1:] in PLACES):
        raise ValueError(f"{' '.join(words)!r} is no object: [SIZE] [COLOUR] SHAPE [@PLACE]")
    return Wanted(shape, colour, size, PLACES[place[1:]] if place else None)


def wrong(wish: Wish, image: Image.Image | Pixels) -> set[str]:
    """Returns the names of the marks that a picture has wrong. Two wanted objects may come in any order."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    seen = recognize(picture)
    orders = permutations(seen.things, len(wish.things))  # none if too few are seen
    return min((_faults(wish, seen, order) for order in orders), key=len, default=_faults(wish, seen, ()))


def _faults(wish: Wish, seen: Seen, order: tuple[Thing, ...]) -> set[str]:
    found = len(order) == len(wish.things)
    pairs = list(zip(wish.things, order, strict=found))
    marks = {
        "background": wish.background in (None, seen.background),
        "count": len(seen.things) == len(wish.things),
        "colour": found and all(one.colour in (None, other.colour) for one, other in pairs),
        "shape": found and all(one.shape == other.shape for one, other in pairs),
        "place": found and all(_is_near(one, other) for one, other in pairs) and _is_related(wish, order),
        "size": found and all(one.size in (None, other.size) for one, other in pairs),
    }
    return {mark for mark, is_right in marks.items() if not is_right}


def _is_near(one: Wanted, other: Thing) -> bool:
    if one.place is None:
        return True
    x, y = one.place
    return max(abs(other.x - x), abs(other.y - y)) < NEAR


def _is_related(wish: Wish, order: tuple[Thing, ...]) -> bool:
    if wish.relation is None:
        return True
    first, second = order
    return RELATIONS[wish.relation](second.x - first.x, second.y - first.y)
