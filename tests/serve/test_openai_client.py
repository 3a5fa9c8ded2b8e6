"""The official `openai` client, unmodified, generates and edits."""

import base64
import io
from collections.abc import Iterator
from typing import Literal

import httpx
import openai
import pytest
from PIL import Image

from tests.serve.conftest import Server

EXTRA = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def source(color: str, size: tuple[int, int] = (512, 512)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_generate_answers_urls_by_default(sdk: openai.OpenAI) -> None:
    answer = sdk.images.generate(prompt="a boat", size="512x512", n=2, extra_body=EXTRA)
    assert answer.data is not None
    assert [image.model_extra for image in answer.data] == [{"seed": 5}, {"seed": 6}]
    for image in answer.data:
        assert image.url is not None
        file = httpx.get(image.url)
        assert file.headers["content-type"] == "image/png"
        assert file.headers["x-content-type-options"] == "nosniff"
        assert opened(file.content).size == (512, 512)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_generate_answers_base64_in_any_format(
    sdk: openai.OpenAI, output_format: Literal["png", "jpeg", "webp"]
) -> None:
    answer = sdk.images.generate(
        prompt="a boat",
        size="512x512",
        response_format="b64_json",
        output_format=output_format,
        extra_body=EXTRA,
    )
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    assert opened(base64.b64decode(answer.data[0].b64_json)).format == output_format.upper()
    assert answer.output_format == output_format
    assert answer.size == "512x512"


def test_output_compression_makes_smaller_files(sdk: openai.OpenAI) -> None:
    def size(compression: int) -> int:
        answer = sdk.images.generate(
            prompt="a boat",
            size="512x512",
            response_format="b64_json",
            output_format="jpeg",
            output_compression=compression,
            extra_body=EXTRA,
        )
        assert answer.data is not None
        return len(answer.data[0].b64_json or "")

    assert size(10) < size(100) / 2


def test_without_a_seed_each_answer_tells_its_own(sdk: openai.OpenAI) -> None:
    seeds = set()
    for _ in range(2):
        answer = sdk.images.generate(prompt="a boat", size="512x512", extra_body={"num_inference_steps": 1})
        assert answer.data is not None
        assert answer.data[0].model_extra is not None
        seeds.add(answer.data[0].model_extra["seed"])
    assert len(seeds) == 2


def test_edit_one_image_takes_its_size(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=source("red", (700, 513)), prompt="make it blue", extra_body=EXTRA)
    assert answer.size == "704x512"
    assert answer.data is not None
    assert answer.data[0].url is not None
    assert opened(httpx.get(answer.data[0].url).content).size == (704, 512)


def test_edit_four_images(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(
        image=[source(color) for color in ("red", "green", "blue", "white")],
        prompt="combine them",
        size="512x512",
        response_format="b64_json",
        extra_body=EXTRA,
    )
    assert answer.data is not None
    assert opened(base64.b64decode(answer.data[0].b64_json or "")).size == (512, 512)


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["glm-image", "other"]
    assert sdk.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_a_bad_parameter_is_named(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="a boat", extra_body={"num_inference_steps": 0})
    assert caught.value.param == "num_inference_steps"
    assert caught.value.type == "invalid_request_error"
    assert "num_inference_steps must be 1 to 100, not 0" in caught.value.message


def test_a_parameter_that_is_not_honoured_is_refused(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.edit(image=source("red"), mask=source("white"), prompt="x")
    assert caught.value.param == "mask"
    assert caught.value.code == "unknown_parameter"
