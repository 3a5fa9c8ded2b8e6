"""Both model families on one server (`configs/tiny-both.yaml`). Their pixels equal those of diffusers."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import openai
import pytest
import torch
import yaml
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image

from deployments.families.glm_image import tiny as glm_image
from deployments.families.z_image import tiny as z_image
from deployments.types import Pixels
from tests.polling import until
from tests.serve.conftest import ROOT, Upstream, config_file, served

pytestmark = pytest.mark.slow
PROMPT = "A lighthouse with the words ÖFFNUNG 9–17 on it"
STEPS: dict[str, Any] = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    args = yaml.safe_load((ROOT / "configs/tiny-both.yaml").read_text())["applications"][0]["args"]
    with served(config_file(tmp_path_factory.mktemp("both"), args.pop("models"), **args)) as running:
        yield running.url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@cache
def pipelines() -> tuple[ZImagePipeline, ZImageImg2ImgPipeline]:
    generating = ZImagePipeline.from_pretrained(z_image.cached(), local_files_only=True)
    editing = ZImageImg2ImgPipeline(**generating.components)
    for pipeline in (generating, editing):
        pipeline.set_progress_bar_config(disable=True)
    return generating, editing


def upstream_pixels(seed: int, source: Pixels | None = None, **arguments: Any) -> Pixels:
    """Returns the image of diffusers' own pipeline."""
    torch.set_num_threads(1)  # like the server's stages
    generating, editing = pipelines()
    arguments |= {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": 4} | arguments
    if source is None:
        images = generating(PROMPT, width=544, height=512, **arguments).images
    else:
        images = editing(PROMPT, Image.fromarray(source), **arguments).images
    return np.asarray(images[0])


def pixels(answer: Any) -> list[Pixels]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))) for one in answer.data]


def generate(client: openai.OpenAI, model: str, n: int = 1, **extra: Any) -> list[Pixels]:
    answer = client.images.generate(
        model=model,
        prompt=PROMPT,
        size="544x512",
        n=n,
        response_format="b64_json",
        extra_body={"seed": 7} | extra,
    )
    return pixels(answer)


SOURCE = np.random.default_rng(0).integers(0, 256, (544, 512, 3), dtype=np.uint8)


def edit(client: openai.OpenAI, model: str, source: Pixels = SOURCE, **fields: Any) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(source).save(file, "PNG")
    extra = {name: value for name, value in fields.items() if name != "size"}
    (image,) = pixels(
        client.images.edit(
            model=model,
            prompt=PROMPT,
            image=("source.png", file.getvalue()),
            response_format="b64_json",
            extra_body={"seed": 7} | extra,
            **{name: value for name, value in fields.items() if name == "size"},
        )
    )
    return image


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"guidance_scale": 4.0}),
        ({"negative_prompt": "blurry"}, {"guidance_scale": 4.0, "negative_prompt": "blurry"}),
        ({"guidance_scale": 0}, {"guidance_scale": 0.0}),
        (
            {"guidance_scale": 7.5, "cfg_normalization": True, "negative_prompt": "blurry"},
            {"guidance_scale": 7.5, "cfg_normalization": True, "negative_prompt": "blurry"},
        ),
    ],
)
def test_text_to_image_equals_upstream(
    client: openai.OpenAI, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    first, second = generate(client, "z-image", n=2, **STEPS, **fields)
    assert np.array_equal(first, upstream_pixels(7, **expected))
    assert np.array_equal(second, upstream_pixels(8, **expected))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"guidance_scale": 1.5, "strength": 0.6}),
        (
            {"strength": 0.3, "guidance_scale": 5, "negative_prompt": "dark"},
            {"strength": 0.3, "guidance_scale": 5.0, "negative_prompt": "dark"},
        ),
        ({"strength": 1, "cfg_normalization": True}, {"strength": 1.0, "cfg_normalization": True}),
    ],
)
def test_edits_equal_upstream(
    client: openai.OpenAI, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    expected = {"guidance_scale": 1.5} | expected
    assert np.array_equal(edit(client, "z-image", **STEPS, **fields), upstream_pixels(7, SOURCE, **expected))


def test_a_source_image_is_resized_and_cropped_to_the_output_size(client: openai.OpenAI) -> None:
    made = edit(client, "z-image", size="1024x512", **STEPS)
    middle = Image.fromarray(SOURCE).resize((1024, 512), Image.Resampling.LANCZOS, (0, 144, 512, 400))
    assert np.array_equal(made, upstream_pixels(7, np.asarray(middle), guidance_scale=1.5, strength=0.6))


def test_turbo_has_its_own_defaults(client: openai.OpenAI) -> None:
    turbo: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 0.0}
    (generated,) = generate(client, "z-image-turbo")
    assert np.array_equal(generated, upstream_pixels(7, **turbo))
    assert np.array_equal(edit(client, "z-image-turbo"), upstream_pixels(7, SOURCE, strength=0.6, **turbo))


def test_the_first_model_is_the_default(client: openai.OpenAI, upstream: Callable[[Path], Upstream]) -> None:
    answer = client.images.generate(
        prompt=PROMPT,
        size="512x512",
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 2},
    )
    assert np.array_equal(pixels(answer)[0], upstream(glm_image.cached())(PROMPT, 512, 512, seed=7))


def test_a_job_and_fals_api_return_the_same_pixels(client: openai.OpenAI, http: httpx.Client) -> None:
    (expected,) = generate(client, "z-image", **STEPS, negative_prompt="blurry")
    body = {"model": "z-image", "prompt": PROMPT, "size": "544x512", "seed": 7, "negative_prompt": "blurry"}
    job = http.post("/v1/images/jobs", json=body | STEPS).json()
    until(lambda: http.get(f"/v1/images/jobs/{job['id']}").json()["status"] == "succeeded")
    result = http.get(f"/v1/images/jobs/{job['id']}").json()["result"]["data"][0]
    file = http.get(result["url"]).content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), expected)

    body = {"prompt": PROMPT, "image_size": {"width": 544, "height": 512}, "seed": 7, "output_format": "png"}
    image = http.post("/fal-ai/z-image-turbo", json=body).json()["images"][0]
    expected = generate(client, "z-image-turbo")[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(http.get(image["url"]).content))), expected)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"model": "glm-image", "negative_prompt": "x"}, "negative_prompt", "not supported by glm-image"),
        (
            {"model": "glm-image", "cfg_normalization": True},
            "cfg_normalization",
            "not supported by glm-image",
        ),
        ({"model": "glm-image", "strength": 0.5}, "strength", "not supported by glm-image"),
        ({"model": "z-image", "strength": 0.5}, "strength", "no source image"),
        ({"model": "z-image-turbo", "negative_prompt": "x"}, "negative_prompt", "guidance is off"),
        ({"model": "z-image", "guidance_scale": 0, "cfg_normalization": True}, "cfg_normalization", "is off"),
        ({"model": "z-image", "prompt": "x" * 600}, "prompt", "takes at most 512; shorten it"),
        ({"model": "z-image", "negative_prompt": "x" * 600}, "negative_prompt", "takes at most 512"),
    ],
)
def test_parameters_that_a_model_does_not_support_are_rejected(
    http: httpx.Client, fields: dict[str, Any], param: str, reason: str
) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a boat", "size": "512x512"} | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


def test_too_many_source_images_are_rejected(http: httpx.Client) -> None:
    file = io.BytesIO()
    Image.fromarray(SOURCE).save(file, "PNG")
    files = [("image[]", file.getvalue())] * 2
    answer = http.post("/v1/images/edits", data={"prompt": "x", "model": "z-image"}, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "image"


def test_models_list_their_parameters(http: httpx.Client) -> None:
    glm, base, turbo = http.get("/v1/models").json()["data"]
    assert set(base["parameters"]) - set(glm["parameters"]) == {
        "negative_prompt",
        "cfg_normalization",
        "strength",
    }
    assert {"prompt", "seed", "guidance_scale"} <= set(glm["parameters"])
    assert "style" not in base["parameters"]
    assert base["defaults"] == {
        "size": "1024x1024",
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "edit_guidance_scale": 1.5,
        "strength": 0.6,
    }
    assert turbo["defaults"]["num_inference_steps"] == 8
    assert (glm["guidance_off"], base["guidance_off"]) == (1, 0)
    assert (glm["max_source_images"], base["max_source_images"]) == (4, 1)
    assert (glm["speculation"], base["speculation"]) == ("auto", None)


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({"model": "z-image", "negative_prompt": "x"}, True),
        ({"model": "glm-image", "negative_prompt": "x"}, False),
        ({"negative_prompt": "x"}, False),
        ({"negative_prompt": ""}, True),
        ({"model": "z-image", "cfg_normalization": True}, True),
        ({"cfg_normalization": True}, False),
        ({"cfg_normalization": None}, True),
        ({"model": "z-image", "guidance_scale": 0, "negative_prompt": "x"}, False),
        ({"model": "z-image-turbo", "negative_prompt": "x"}, False),
        ({"model": "z-image-turbo", "guidance_scale": 2, "negative_prompt": "x"}, True),
        ({"model": "z-image", "strength": 0.5}, False),
    ],
)
def test_the_openapi_schema_lists_the_parameters_of_each_model(
    http: httpx.Client, fields: dict[str, Any], is_valid: bool
) -> None:
    route = http.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"]
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema_rs.validator_for(schema).is_valid({"prompt": "a boat"} | fields) == is_valid
    body = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1} | fields
    assert (http.post("/v1/images/generations", json=body).status_code == 200) == is_valid


def test_both_families_stream_previews(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "size": "512x512", "stream": True, "partial_images": 2} | STEPS
    for model in ("glm-image", "z-image"):
        with http.stream("POST", "/v1/images/generations", json=body | {"model": model}) as answer:
            text = answer.read().decode()
        assert re.findall("^event: (.*)$", text, re.MULTILINE) == [
            "image_generation.partial_image",
            "image_generation.partial_image",
            "image_generation.completed",
        ]


def test_unloading_one_model_leaves_the_other_generating(client: openai.OpenAI, http: httpx.Client) -> None:
    generate(client, "glm-image", num_inference_steps=2)
    with ThreadPoolExecutor(1) as pool:
        before = http.get("/health").json()["models"]
        generation = pool.submit(generate, client, "z-image", num_inference_steps=40)
        until(lambda: http.get("/v1/internal/status").json()["status"] == "generating")
        answer = http.post("/v1/internal/unload?model=glm-image")
        assert answer.status_code == 200, answer.text
        assert not generation.done()
        states = http.get("/health").json()["models"]
        assert {stage["state"] for stage in states["glm-image"].values()} == {"unloaded"}
        assert "unloaded" not in {stage["state"] for stage in states["z-image"].values()}
        assert {stage["state"] for stage in before["glm-image"].values()} == {"ready"}
        (image,) = generation.result(120)
    assert np.array_equal(image, upstream_pixels(7, guidance_scale=4.0, num_inference_steps=40))
