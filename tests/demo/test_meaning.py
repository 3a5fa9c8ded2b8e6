"""Tests with a real server, over HTTP, that the demo checkpoint paints the requested scene by any API."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from deployments.types import Pixels
from tests.demo import by_hand
from tests.demo.conftest import CONFIG, demo_config
from tests.demo.judge import recognize, wrong
from tests.job_client import ended, pixels, submit
from tests.serve.conftest import served
from tests.serve.test_exactness import edit
from tests.serve.test_exactness import generate as generate_some
from training.demo.scenes import COLOURS, Scene, Thing

pytestmark = pytest.mark.slow
EXTRA = {"num_inference_steps": 8, "seed": 1}
USUAL: dict[str, Any] = {"size": "512x512"} | EXTRA
CLOSE, SLACK = 4, 0.25
"""Tolerances of pixel values from 0 to 255. Even the last preview differs: previews use averaged latents."""
NEAR = 0.03
"""Distance below which places count as equal, as a share of a side. A pixel of the judge is 0.008."""
CIRCLE = Scene("white", (Thing("circle", "red", "medium", 0.5, 0.5),), "a red circle on a white background")
SCENES = [
    Scene(
        "yellow",
        (Thing("star", "red", "small", 0.5, 0.25), Thing("circle", "blue", "medium", 0.5, 0.75)),
        "a small red star above a blue circle on a yellow background",
    ),
    Scene(
        "white",
        (Thing("triangle", "green", "medium", 0.25, 0.5), Thing("square", "purple", "medium", 0.75, 0.5)),
        "a green triangle to the left of a purple square on a white background",
    ),
    Scene(
        "orange",
        (Thing("square", "black", "large", 0.5, 0.5),),
        "a large black square on an orange background",
    ),
    Scene(
        "blue",
        (Thing("circle", "yellow", "medium", 0.75, 0.75),),
        "a yellow circle in the bottom right corner on a blue background",
    ),
]
EXAMPLES = [
    by_hand.parse(line)
    for line in (
        "A small red star above a blue circle on a yellow background"
        " | small red star above blue circle | yellow",
        "A red ball next to a blue box | red circle beside blue square",
        "A green triangle at the top left | green triangle @top-left",
        "A large purple square on an orange background | large purple square | orange",
        "A tiny yellow star in the bottom right corner, blue background"
        " | small yellow star @bottom-right | blue",
        "Two green squares on a white background | green square and green square | white",
        "A big white circle on black | large white circle | black",
        "An orange triangle below a purple circle | orange triangle below purple circle",
        "A black star on the right, yellow backdrop | black star @right | yellow",
        "A blue square to the left of a red star | blue square left-of red star",
        "A small black circle in the middle of a green background | small black circle @middle | green",
        "A white star above a green square on a purple background | white star above green square | purple",
    )
]
PLACES = [
    (
        Scene(
            "white", (Thing("circle", "red", "medium", x, y),), f"a red circle {place} on a white background"
        ),
        size,
    )
    for size, place, x, y in (
        ("512x512", "on the left", 0.25, 0.5),
        ("512x512", "at the top", 0.5, 0.25),
        ("768x512", "on the right", 0.75, 0.5),
        ("768x512", "at the top", 0.5, 0.25),
        ("512x768", "on the left", 0.25, 0.5),
        ("512x768", "at the bottom", 0.5, 0.75),
    )
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        served(demo_config(tmp_path_factory.mktemp("demo"), CONFIG)) as running,
        httpx.Client(base_url=running.url, timeout=300) as client,
    ):
        yield client


def generate(client: httpx.Client, prompt: str, **fields: Any) -> list[Pixels]:
    return generate_some(client, **USUAL | {"prompt": prompt} | fields)


@pytest.fixture(scope="module")
def painted(client: httpx.Client) -> dict[tuple[Scene, str], Pixels]:
    """Returns pictures by scene and size. They are requested at once, because that takes half the time."""
    wanted = [(scene, "512x512") for scene in (CIRCLE, *SCENES)] + PLACES
    with ThreadPoolExecutor(len(wanted)) as pool:
        pictures = pool.map(lambda one: generate(client, one[0].sentence, size=one[1])[0], wanted)
        return dict(zip(wanted, pictures, strict=True))


@pytest.fixture(scope="module")
def circle(painted: dict[tuple[Scene, str], Pixels]) -> Pixels:
    return painted[CIRCLE, "512x512"]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.sentence)
def test_a_sentence_is_painted(painted: dict[tuple[Scene, str], Pixels], scene: Scene) -> None:
    assert wrong(scene, painted[scene, "512x512"]) == set()


def test_the_configured_examples_succeed(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["examples"] == [wish.sentence for wish in EXAMPLES]
    with ThreadPoolExecutor(len(EXAMPLES)) as pool:
        pictures = pool.map(lambda wish: generate(client, wish.sentence)[0], EXAMPLES)
    faults = {wish.sentence: by_hand.wrong(wish, one) for wish, one in zip(EXAMPLES, pictures, strict=True)}
    assert not any(faults.values()), faults


@pytest.mark.parametrize(("scene", "size"), PLACES, ids=lambda one: getattr(one, "sentence", one))
def test_left_is_left_and_top_is_top(
    painted: dict[tuple[Scene, str], Pixels], scene: Scene, size: str
) -> None:
    assert wrong(scene, painted[scene, size]) == set()


def test_the_picture_in_the_readme_is_that_of_its_first_request(client: httpx.Client) -> None:
    (picture,) = generate(client, SCENES[0].sentence, seed=7)
    assert wrong(SCENES[0], picture) == set()
    with Image.open(Path(__file__).with_name("star.png")) as shown:
        assert np.abs(picture.astype(int) - np.asarray(shown.convert("RGB"))).mean() < 1


def test_guidance_makes_a_colour_stronger(client: httpx.Client) -> None:
    """Guidance leads away from the average picture, past the colour itself. Few steps do not lead back."""
    scene = Scene(
        "purple",
        (Thing("square", "orange", "large", 0.5, 0.5),),
        "a large orange square on a purple background",
    )
    average = np.mean(list(COLOURS.values()), axis=0)
    towards = np.array(COLOURS["orange"]) - average
    strengths = []
    for scale in (1, 1.5, 3):
        (picture,) = generate(client, scene.sentence, num_inference_steps=2, guidance_scale=scale)
        assert wrong(scene, picture) == set()
        middle = picture[224:288, 224:288].mean((0, 1))
        strengths.append(float((middle - average) @ towards / (towards @ towards)))
    assert 0.8 < strengths[0] < strengths[1] < strengths[2]


def test_several_images_differ_and_all_show_the_requested_scene(client: httpx.Client) -> None:
    scene = SCENES[0]
    pictures = generate(client, scene.sentence, n=4)
    assert [wrong(scene, picture) for picture in pictures] == [set()] * 4
    assert len({recognize(Image.fromarray(picture)).things for picture in pictures}) > 1, (
        "all in the same places"
    )
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_previews_come_closer_to_the_picture(client: httpx.Client, circle: Pixels) -> None:
    sdk = openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="none", max_retries=0)
    with (
        sdk,
        sdk.images.generate(
            prompt=CIRCLE.sentence, size="512x512", stream=True, partial_images=3, extra_body=EXTRA
        ) as events,
    ):
        *previews, final = (pixels(base64.b64decode(event.b64_json)) for event in events)
    assert np.array_equal(final, circle)
    assert len(previews) == 3
    distances = [distance(preview, final) for preview in previews]
    assert all(later < earlier + SLACK for earlier, later in pairwise(distances))
    assert distances[-1] < CLOSE
    assert wrong(CIRCLE, previews[-1]) == set()


def distance(preview: Pixels, picture: Pixels) -> float:
    """Returns the mean difference of pixel values from 0 to 255."""
    height, width, _ = preview.shape
    small = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX)
    return float(np.abs(np.asarray(small, dtype=float) - preview).mean())


def test_jobs_and_other_dialects_paint_the_same_picture(client: httpx.Client, circle: Pixels) -> None:
    assert wrong(CIRCLE, circle) == set()
    body = USUAL | {"prompt": CIRCLE.sentence}
    job = ended(client, submit(client, **body))["result"]
    zai = client.post("/api/paas/v4/images/generations", json=body | {"model": "glm-image"}).json()
    files = [client.get(answer["data"][0]["url"]).content for answer in (job, zai)]
    assert files[0] == files[1]
    assert np.array_equal(pixels(files[0]), circle)


def test_an_edit_changes_the_requested_colour_and_nothing_else(client: httpx.Client, circle: Pixels) -> None:
    assert wrong(CIRCLE, circle) == set()
    (edited,) = edit(client, (circle,), **USUAL | {"prompt": "make the circle green"})
    (was,) = recognize(Image.fromarray(circle)).things
    assert wrong(replace(CIRCLE, things=(replace(was, colour="green"),)), edited) == set()
    (is_now,) = recognize(Image.fromarray(edited)).things
    assert max(abs(is_now.x - was.x), abs(is_now.y - was.y)) < NEAR
