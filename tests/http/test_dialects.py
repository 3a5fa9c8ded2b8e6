"""All APIs make the same images of the same parameters, and each words errors in its own way."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.types import ImageRequest
from tests.apis import APIS as IMAGE_APIS
from tests.apis import EDITING, FAL, Asked, By, pixels, polled, posted
from tests.http.conftest import Endpoint, served
from tests.http.stages import pixels_of
from tests.pictures import picture

PROMPT, SEED, STEPS = 'a boat called "Aurora"', 2**40 + 11, 10
OURS = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": SEED}
FAL_BODY = OURS | FAL
EDIT = "glm-image-image-to-image"
IMAGE = ImageRequest(prompt=PROMPT, width=512, height=512, seed=SEED, steps=STEPS, guidance_scale=1.5)
"""Request that the stages must get."""


@pytest.fixture
def http(vendors: Endpoint) -> Iterator[httpx.Client]:
    with vendors.client(authorization=f"Key {vendors.key}") as client:
        yield client


def by_fals_other_host(http: httpx.Client, asked: Asked) -> str:
    path, body = "/fal-ai/glm-image", asked.fields | FAL | {"sync_mode": True}
    queued = posted(http, path, body, host=f"Queue.{http.base_url.netloc.decode()}")
    path += f"/requests/{queued['request_id']}"
    assert queued["status_url"].lower().startswith("https://queue.")
    polled(http, f"/queue{path}/status", lambda status: status["status"] == "COMPLETED")
    return str(http.get(f"/queue{path}").json()["images"][0]["url"])


@pytest.mark.parametrize("by", [*IMAGE_APIS, by_fals_other_host])
def test_every_api_makes_the_same_image(http: httpx.Client, by: By) -> None:
    assert np.array_equal(pixels(http, by(http, Asked(PROMPT, SEED, STEPS))), pixels_of(IMAGE))


@pytest.mark.parametrize("by", EDITING)
def test_every_api_makes_the_same_edit(http: httpx.Client, by: By) -> None:
    source = np.full((512, 512, 3), (200, 30, 90), dtype=np.uint8)
    url = f"data:image/png;base64,{base64.b64encode(picture((200, 30, 90))).decode()}"
    expected = pixels_of(replace(IMAGE, sources=(source,)))
    assert np.array_equal(pixels(http, by(http, Asked(PROMPT, SEED, STEPS, url))), expected)


@pytest.mark.parametrize(("quality", "steps"), [("hd", 50), ("standard", 30)])
def test_zais_quality_is_a_number_of_steps(http: httpx.Client, quality: str, steps: int) -> None:
    body = {"prompt": PROMPT, "seed": SEED, "size": "512x512", "model": "glm-image", "quality": quality}
    made = posted(http, "/api/paas/v4/images/generations", body)
    assert np.array_equal(pixels(http, made["data"][0]["url"]), pixels_of(replace(IMAGE, steps=steps)))


def test_a_size_between_legal_ones_is_cut_from_the_next_larger_one(http: httpx.Client) -> None:
    whole = pixels_of(replace(IMAGE, width=544, height=608))
    body = FAL_BODY | {"image_size": {"width": 520, "height": 600}}
    by_fal = posted(http, "/fal-ai/glm-image", body)["images"][0]
    by_job = posted(http, "/glm-image/v1/glm-image-request", body, prefer="wait=60")["images"][0]
    for image in (by_fal, by_job):
        assert (image["width"], image["height"]) == (520, 600)
        assert np.array_equal(pixels(http, image["url"]), whole[4:604, 12:532])


def is_openais(body: dict[str, Any]) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


def is_fals(body: dict[str, Any]) -> bool:
    if isinstance(body["detail"], list):
        return set(body) == {"detail"} and all(set(one) == {"loc", "msg", "type"} for one in body["detail"])
    return set(body) == {"detail", "error_type"}


def is_nested(body: dict[str, Any]) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"code", "message"}


def is_flat(body: dict[str, Any]) -> bool:
    return set(body) == {"error", "code"} and isinstance(body["error"], str)


APIS = {
    "openai": ("/v1/images/generations", "/v1/nothing", is_openais, 400),
    "jobs": ("/v1/images/jobs", "/v1/images/nothing", is_openais, 400),
    "fal": ("/fal-ai/glm-image", "/fal-ai/a/b/c/d", is_fals, 422),
    "fal's queue": ("/queue/fal-ai/glm-image", "/queue/nothing", is_fals, 422),
    "fal's uploads": ("/storage/upload/initiate", "/storage/nothing", is_fals, 422),
    "zai": ("/api/paas/v4/images/generations", "/api/paas/v4/nothing", is_nested, 400),
    "zai's tasks": ("/api/paas/v4/async/images/generations", "/api/paas/v4/a/b", is_nested, 400),
    "pixazo": ("/glm-image/v1/glm-image-request", "/glm-image/v1/nothing", is_nested, 400),
    "pixazo's edits": (f"/{EDIT}/v1/{EDIT}-request", f"/{EDIT}/v1/nothing", is_flat, 400),
    "pixazo's states": ("/v2/requests/status/a_b", "/v2/requests/nothing", is_nested, 400),
}


@pytest.mark.parametrize("api", APIS)
def test_every_api_words_errors_in_its_own_way(vendors: Endpoint, http: httpx.Client, api: str) -> None:
    path, nothing, is_its_own, invalid = APIS[api]
    with vendors.client() as stranger:
        answers = {
            401: stranger.post(path, content=b"{", headers={"Content-Type": "application/json"}),
            404: http.get(nothing),
            405: http.delete(path),
            413: http.post(path, content=b" " * (2**23 + 1), headers={"Content-Type": "application/json"}),
            invalid: http.post(path, content=b'{"a', headers={"Content-Type": "application/json"}),
        }
    for status, answer in answers.items():
        assert answer.status_code == status, answer.text
        assert is_its_own(answer.json()), (status, answer.text)
        assert ("x-fal-request-id" in answer.headers) == api.startswith("fal")
    assert "POST" in answers[405].headers["allow"]


@pytest.mark.parametrize("api", [api for api in APIS if "uploads" not in api and "states" not in api])
@pytest.mark.parametrize(
    "wrong",
    [
        b"[]",
        b"7",
        b'{"prompt": 7}',
        b'{"prompt": "  "}',
        b'{"prompt": "a boat", "seed": -1}',
        b'{"prompt": "a boat", "seed": 1.5}',
        b'{"prompt": "a boat", "seed": true}',
        b'{"prompt": "a boat", "seed": 9223372036854775808}',
        b'{"prompt": "a boat", "guidance_scale": NaN}',
        b'{"prompt": "a boat", "guidance_scale": "3"}',
        b'{"prompt": "a boat", "num_inference_steps": 101}',
        b'{"prompt": "a boat", "unheard_of": 1}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a boat", "image_urls": [' + b"[" * 5000 + b"]}",
        b'{"prompt": "a boat", "image_urls": []}',
        b'{"prompt": "a boat", "image_size": {"width": 511, "height": 512}}',
        b'{"prompt": "a boat", "image_size": {"width": 512}}',
        b'{"prompt": "a boat", "size": "513x512"}',
        b'{"prompt": "a boat", "enable_prompt_expansion": true}',
    ],
    ids=repr,
)
def test_bad_input_is_rejected_in_the_apis_own_way(http: httpx.Client, api: str, wrong: bytes) -> None:
    path, _, is_its_own, invalid = APIS[api]
    if "zai" in api and wrong.startswith(b"{"):
        wrong = b'{"model": "glm-image", ' + wrong[1:]
    answer = http.post(path, content=wrong, headers={"Content-Type": "application/json"})
    assert answer.status_code == invalid, answer.text
    assert is_its_own(answer.json())
    assert "Traceback" not in answer.text


def test_jobs_of_one_api_are_unknown_to_the_others(http: httpx.Client) -> None:
    body = {"prompt": "a boat", "num_inference_steps": 10, "image_size": "square"}
    job_id = posted(http, "/queue/fal-ai/glm-image", body)["request_id"]
    for path in (f"/v1/images/jobs/{job_id}", f"/api/paas/v4/async-result/{job_id}"):
        assert http.get(path).status_code == 404
    assert http.get(f"/v2/requests/status/glm-image_{job_id}").status_code == 404
    assert http.get(f"/queue/fal-ai/broken/requests/{job_id}").status_code == 404
    listed = http.get("/v1/images/jobs", params={"limit": 100}).json()["data"]
    assert job_id not in [job["id"] for job in listed]


def test_a_documented_default_above_the_limit_gives_way_to_the_models(tmp_path: Path) -> None:
    with (
        served(tmp_path, "glm-image", defaults={"steps": 8}, limits={"max_steps": 20}) as server,
        server.client() as http,
    ):
        asked = {name: value for name, value in FAL_BODY.items() if name != "num_inference_steps"}
        made = posted(http, "/fal-ai/glm-image", asked | {"sync_mode": True})
        assert np.array_equal(pixels(http, made["images"][0]["url"]), pixels_of(replace(IMAGE, steps=8)))
