"""Generation and edits with the official `openai` client, unmodified."""

import base64
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest

from tests.http.conftest import Endpoint
from tests.pictures import opened, picture

EXTRA = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture
def sdk(server: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def test_generate_returns_urls_by_default(sdk: openai.OpenAI) -> None:
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
def test_generate_returns_base64_in_each_format(
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


def test_requests_without_a_seed_get_different_seeds(sdk: openai.OpenAI) -> None:
    seeds = set()
    for _ in range(2):
        answer = sdk.images.generate(prompt="a boat", size="512x512", extra_body={"num_inference_steps": 1})
        assert answer.data is not None
        assert answer.data[0].model_extra is not None
        seeds.add(answer.data[0].model_extra["seed"])
    assert len(seeds) == 2


def test_an_edit_has_the_size_of_its_source_image(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=picture("red", (700, 513)), prompt="make it blue", extra_body=EXTRA)
    assert answer.size == "704x512"
    assert answer.data is not None
    assert answer.data[0].url is not None
    assert opened(httpx.get(answer.data[0].url).content).size == (704, 512)


def test_an_edit_accepts_four_source_images(sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(
        image=[picture(color) for color in ("red", "green", "blue", "white")],
        prompt="combine them",
        size="512x512",
        response_format="b64_json",
        extra_body=EXTRA,
    )
    assert answer.data is not None
    assert opened(base64.b64decode(answer.data[0].b64_json or "")).size == (512, 512)


def test_a_json_edit_accepts_image_urls(sdk: openai.OpenAI, server: Endpoint) -> None:
    """OpenAI's API accepts edits as JSON, but its client sends only forms.

    https://platform.openai.com/docs/api-reference/images
    """
    red = picture("red")

    def edited(url: str) -> Any:
        body = {"prompt": "make it blue", "response_format": "b64_json", "images": [{"image_url": url}]}
        return httpx.post(f"{server.url}/v1/images/edits", json=body | EXTRA, timeout=60).json()

    by_form = sdk.images.edit(image=red, prompt="make it blue", response_format="b64_json", extra_body=EXTRA)
    assert by_form.data is not None
    by_data = edited(f"data:image/png;base64,{base64.b64encode(red).decode()}")
    assert by_data["data"][0]["b64_json"] == by_form.data[0].b64_json
    generated = sdk.images.generate(prompt="a boat", size="512x512", extra_body=EXTRA)
    assert generated.data is not None
    assert edited(generated.data[0].url or "")["size"] == "512x512"


def test_models_are_listed_and_retrieved(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["glm-image", "other"]
    assert sdk.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_an_invalid_parameter_is_named(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="a boat", extra_body={"num_inference_steps": 0})
    assert caught.value.param == "num_inference_steps"
    assert caught.value.type == "invalid_request_error"
    assert "num_inference_steps must be 1 to 100, not 0" in caught.value.message


def test_an_unsupported_parameter_is_rejected(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.edit(image=picture("red"), mask=picture("white"), prompt="x")
    assert caught.value.param == "mask"
    assert caught.value.code == "unsupported_parameter"


def test_quality_sets_the_steps_unless_the_request_does(sdk: openai.OpenAI) -> None:
    def generated(**fields: Any) -> tuple[str | None, str | None]:
        answer = sdk.images.generate(prompt="a boat", size="512x512", response_format="b64_json", **fields)
        assert answer.data is not None
        return answer.data[0].b64_json, answer.quality

    seed = {"seed": 5}
    low, quality = generated(quality="low", extra_body=seed)
    assert quality == "low"
    assert generated(extra_body=seed | {"num_inference_steps": 15}) == (low, None)
    assert generated(quality="max", extra_body=seed | {"num_inference_steps": 15}) == (low, None)
    standard, quality = generated(quality="standard", extra_body=seed)
    assert quality == "medium"
    assert generated(extra_body=seed | {"num_inference_steps": 30}) == (standard, None)


def test_hints_and_empty_values_are_accepted(sdk: openai.OpenAI) -> None:
    unset: Any = None
    answer = sdk.images.generate(
        prompt="a boat",
        size="512x512",
        n=unset,
        model="",
        style="vivid",
        moderation="low",
        user="somebody",
        background="opaque",
        stream=False,
        extra_body=EXTRA | {"negative_prompt": "", "cfg_normalization": False, "safety_identifier": "x"},
    )
    assert answer.background == "opaque"
    edited = sdk.images.edit(
        image=picture("red"),
        prompt="make it blue",
        input_fidelity="high",
        background="auto",
        user="somebody",
        stream=False,
        extra_body=EXTRA | {"negative_prompt": "", "cfg_normalization": "false"},
    )
    assert edited.size == "512x512"


def test_an_edit_can_be_streamed(sdk: openai.OpenAI) -> None:
    (event,) = sdk.images.edit(image=picture("red"), prompt="make it blue", stream=True, extra_body=EXTRA)
    assert event.type == "image_edit.completed"
    assert opened(base64.b64decode(event.b64_json)).size == (512, 512)
    details = event.usage.input_tokens_details
    assert details.image_tokens == 16 * 16
    assert details.text_tokens > 0
    assert event.usage.input_tokens == details.image_tokens + details.text_tokens
    assert event.usage.output_tokens >= 16 * 16


def test_an_invalid_streaming_request_gets_an_ordinary_error(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="a boat", size="512x512", n=11, stream=True)
    assert caught.value.param == "n"
