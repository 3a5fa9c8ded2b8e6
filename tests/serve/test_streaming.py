"""Streams of the official `openai` client, unmodified."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.pictures import opened, picture
from tests.polling import until
from tests.serve.conftest import Server

EXTRA = {"num_inference_steps": 2, "seed": 5}


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def test_a_stream_contains_previews_and_each_image(sdk: openai.OpenAI) -> None:
    plain = sdk.images.generate(
        prompt="a boat", size="512x512", n=2, response_format="b64_json", extra_body=EXTRA
    )
    events: list[Any] = list(
        sdk.images.generate(
            prompt="a boat", size="512x512", n=2, stream=True, partial_images=1, extra_body=EXTRA
        )
    )
    kinds = [event.type for event in events]
    assert sorted(kinds) == ["image_generation.completed"] * 2 + ["image_generation.partial_image"] * 2
    assert kinds[0] == "image_generation.partial_image"
    completed = {event.seed: event for event in events if event.type == "image_generation.completed"}
    assert plain.data is not None
    assert [completed[seed].b64_json for seed in (5, 6)] == [image.b64_json for image in plain.data]
    for event in events:
        image = opened(base64.b64decode(event.b64_json))
        assert event.size == f"{image.width}x{image.height}"
        assert (event.background, event.output_format) == ("opaque", "png")
        assert event.created_at > 0
    assert plain.usage is not None
    assert sum(event.usage.total_tokens for event in completed.values()) == plain.usage.total_tokens


def test_the_asynchronous_client_generates_edits_and_streams_concurrently(server: Server) -> None:
    async def main() -> Any:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as sdk:

            async def stream() -> list[Any]:
                events = await sdk.images.generate(
                    prompt="a boat", size="512x512", stream=True, partial_images=1, extra_body=EXTRA
                )
                return [event async for event in events]

            return await asyncio.gather(
                sdk.images.generate(
                    prompt="a boat", size="512x512", response_format="b64_json", extra_body=EXTRA
                ),
                sdk.images.edit(image=picture("red"), prompt="make it blue", extra_body=EXTRA),
                stream(),
            )

    generated, edited, (preview, completed) = asyncio.run(main())
    assert generated.data[0].b64_json == completed.b64_json
    assert generated.data[0].revised_prompt == "a boat"
    assert edited.size == "512x512"
    assert preview.type == "image_generation.partial_image"


def test_closing_a_stream_aborts_its_request(server: Server) -> None:
    body = {"prompt": "a boat", "size": "1024x1024", "num_inference_steps": 100, "stream": True}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        with client.stream("POST", "/v1/images/generations", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            until(lambda: client.get("/v1/internal/status").json()["status"] == "generating")
        until(lambda: not client.get("/v1/internal/status").json()["units"], timeout_s=10)


def test_every_response_has_a_request_id(sdk: openai.OpenAI) -> None:
    answer = sdk.images.generate(
        prompt="a boat", size="512x512", extra_body=EXTRA, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert answer._request_id == "mine-1"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="")
    assert caught.value.request_id
