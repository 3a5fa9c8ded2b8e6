"""Tests that the judge is right about true pictures and about wrong ones."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.demo.judge import drawn, wrong
from training.demo.scenes import COLOURS, SHAPES, Scene, Thing, random_scene, shifted

SCENE = Scene(
    "yellow",
    (Thing("star", "red", "small", 0.5, 0.25), Thing("circle", "blue", "medium", 0.5, 0.75)),
    "a small red star above a blue circle on a yellow background",
)


@pytest.mark.parametrize(("width", "height", "count"), [(512, 512, 100), (768, 512, 25), (1024, 1024, 10)])
@pytest.mark.parametrize("aligned", [True, False])
def test_true_pictures_are_right(width: int, height: int, count: int, aligned: bool) -> None:
    rng = random.Random(f"{width} {height}")
    for _ in range(count):
        scene = random_scene(rng)
        for one in (scene, shifted(scene, rng)):
            assert wrong(scene, drawn(one, width, height, aligned=aligned)) == set(), one


def changed(**fields: str | float) -> Scene:
    """Returns the scene with a changed first object."""
    first, second = SCENE.things
    return replace(SCENE, things=(replace(first, **fields), second))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shown", "faults"),
    [
        (replace(SCENE, background="orange"), {"background"}),
        *((changed(colour=one), {"colour"}) for one in COLOURS if one not in ("red", "yellow")),
        *((changed(shape=one), {"shape"}) for one in SHAPES if one != "star"),
        (changed(size="medium"), {"size"}),
        (changed(x=0.25), {"place"}),
        (replace(SCENE, things=SCENE.things[:1]), {"count", "colour", "shape", "place", "size"}),
        (replace(SCENE, things=()), {"count", "colour", "shape", "place", "size"}),
        (replace(SCENE, things=(*SCENE.things, Thing("star", "red", "small", 0.1, 0.5))), {"count"}),
    ],
)
def test_faults_are_reported(shown: Scene, faults: set[str]) -> None:
    assert wrong(SCENE, drawn(shown, 512, 512)) == faults


def test_a_mirrored_picture_has_its_objects_in_wrong_places() -> None:
    upside_down = drawn(SCENE, 512, 512)[::-1]
    assert wrong(SCENE, upside_down) >= {"colour", "size"}
    left = Scene("white", (Thing("circle", "red", "medium", 0.25, 0.5),), "a red circle on the left")
    picture = drawn(left, 768, 512)
    assert wrong(left, picture[:, ::-1]) == {"place"}
    assert wrong(left, picture[::-1]) == set()


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert {"background", "count"} <= wrong(SCENE, noise)
