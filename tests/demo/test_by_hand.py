"""Tests of the sentences written by hand, and of the judge of their pictures."""

from dataclasses import replace

import pytest

from deployments.types import Pixels
from tests.demo.by_hand import PLACES, RELATIONS, UNSEEN, Wanted, Wish, parse, wishes, wrong
from tests.demo.judge import drawn
from training.demo.scenes import COLOURS, Scene, Thing
from training.demo.scenes import PLACES as TRAINED_PLACES

SIDE = 256
WISHES = wishes() + wishes(UNSEEN)
POSITIONS = {
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "left-of": ("left", "right"),
    "right-of": ("right", "left"),
    "beside": ("right", "left"),
    "and": ("top-left", "bottom-right"),
}
BALLS = parse("a red ball left of a box on white | red circle left-of square | white")


def fulfilled(wish: Wish) -> Scene:
    """Returns a scene that a wish describes. Colours that it leaves open are unlike those that it names."""
    named = {wish.background, *(thing.colour for thing in wish.things)}
    other, unnamed = [colour for colour in COLOURS if colour not in named][:2]
    background = wish.background or unnamed
    places = [PLACES[name] for name in POSITIONS[wish.relation]] if wish.relation else [(0.5, 0.5)]
    return Scene(
        background,
        tuple(
            Thing(thing.shape, thing.colour or other, thing.size or "small", *(thing.place or place))
            for thing, place in zip(wish.things, places, strict=True)
        ),
        wish.sentence,
    )


def picture(scene: Scene) -> Pixels:
    return drawn(scene, SIDE, SIDE, aligned=False)


def test_there_are_a_hundred_different_sentences_and_fifty_unseen_ones() -> None:
    assert len({wish.sentence.lower() for wish in WISHES}) == len(WISHES) == 150
    assert len(wishes(UNSEEN)) == 50


def test_only_what_the_demo_is_trained_for_is_demanded() -> None:
    assert set(PLACES.values()) == set(TRAINED_PLACES)
    for wish in WISHES:
        assert 1 <= len(wish.things) <= 2, wish
        assert (wish.relation is None) == (len(wish.things) == 1), wish
        for thing in wish.things:
            assert thing.colour is None or thing.colour != wish.background, wish
            assert thing.size != "large" or (len(wish.things) == 1 and thing.place in (None, (0.5, 0.5))), (
                wish
            )


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: wish.sentence)
def test_a_picture_of_what_a_sentence_demands_is_right(wish: Wish) -> None:
    scene = fulfilled(wish)
    assert wrong(wish, picture(scene)) == set()
    assert "count" in wrong(wish, picture(replace(scene, things=scene.things[:-1])))
    if wish.background:
        used = {wish.background, *(thing.colour for thing in scene.things)}
        another = next(colour for colour in COLOURS if colour not in used)
        assert wrong(wish, picture(replace(scene, background=another))) == {"background"}


def test_a_line_is_parsed() -> None:
    assert parse("A ball | small red circle @top-left | blue") == Wish(
        "A ball", (Wanted("circle", "red", "small", (0.25, 0.25)),), None, "blue"
    )
    assert parse("two | star and red star") == Wish("two", (Wanted("star"), Wanted("star", "red")), "and")


@pytest.mark.parametrize(
    "line",
    [
        "a ball",
        "a ball | ball",
        "a ball | red small circle",
        "a ball | circle @upper-left",
        "a ball | circle above",
        "a ball | circle | mauve",
        "a ball | circle | red | blue",
        " | circle",
    ],
)
def test_a_mistake_in_a_line_is_found(line: str) -> None:
    with pytest.raises(ValueError, match=r"is not a line|is no object"):
        parse(line)


@pytest.mark.parametrize(
    ("changed", "faults"),
    [
        ({"colour": "blue"}, {"colour"}),
        ({"shape": "star"}, {"shape"}),
        ({"x": 0.75, "y": 0.15}, {"place"}),
        ({"size": "medium"}, set()),
    ],
)
def test_what_is_demanded_is_judged(changed: dict[str, str | float], faults: set[str]) -> None:
    scene = fulfilled(BALLS)
    ball = replace(scene.things[0], **changed)  # type: ignore[arg-type]
    assert wrong(BALLS, picture(replace(scene, things=(ball, scene.things[1])))) == faults


@pytest.mark.parametrize(
    "relation", [relation for relation in RELATIONS if relation not in ("beside", "and")]
)
def test_a_relation_has_a_direction(relation: str) -> None:
    wish = replace(BALLS, relation=relation)
    upright = picture(fulfilled(wish))
    assert wrong(wish, upright) == set()
    assert wrong(wish, upright[::-1, ::-1]) == {"place"}
