"""The server's pixels equal those of diffusers' own pipeline, for single and concurrent requests."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.types import Pixels
from tests.serve.conftest import Server, Upstream

PROMPT = 'A lighthouse with the words "ÖFFNUNG 9–17" on it'
REQUEST = {"prompt": PROMPT, "num_inference_steps": 2, "response_format": "b64_json"}


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(answer: httpx.Response) -> list[Pixels]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def generate(client: httpx.Client, **fields: Any) -> list[Pixels]:
    return decoded(client.post("/v1/images/generations", json=REQUEST | fields))


def edit(client: httpx.Client, sources: tuple[Pixels, ...], **fields: Any) -> list[Pixels]:
    files = []
    for source in sources:
        file = io.BytesIO()
        Image.fromarray(source).save(file, "PNG")
        files.append(("image[]", ("upload", file.getvalue(), "application/octet-stream")))
    return decoded(client.post("/v1/images/edits", data=REQUEST | fields, files=files))


@pytest.fixture
def reference(server: Server, upstream: Callable[[Path], Upstream]) -> Upstream:
    return upstream(server.checkpoints["glm-image"])


@pytest.mark.parametrize(("width", "height"), [(512, 512), (768, 512), (1024, 1024)])
def test_text_to_image_equals_upstream(
    client: httpx.Client, reference: Upstream, width: int, height: int
) -> None:
    (pixels,) = generate(client, size=f"{width}x{height}", seed=11)
    assert np.array_equal(pixels, reference(PROMPT, width, height, seed=11))


@pytest.mark.parametrize("sizes", [[(640, 512)], [(512, 512), (512, 2048), (1024, 768), (544, 608)]])
def test_edits_equal_upstream(
    client: httpx.Client, reference: Upstream, sizes: list[tuple[int, int]]
) -> None:
    sources = tuple(noise(*size, seed=i) for i, size in enumerate(sizes))
    (pixels,) = edit(client, sources, seed=12)
    assert np.array_equal(pixels, reference(PROMPT, *sizes[0], seed=12, sources=sources))


def test_an_edit_to_another_size_equals_upstream(client: httpx.Client, reference: Upstream) -> None:
    sources = (noise(640, 512),)
    (pixels,) = edit(client, sources, seed=13, size="512x768")
    assert np.array_equal(pixels, reference(PROMPT, 512, 768, seed=13, sources=sources))


def test_a_checkpoint_with_other_layer_sizes_equals_upstream(
    client: httpx.Client, server: Server, upstream: Callable[[Path], Upstream]
) -> None:
    (pixels,) = generate(client, model="other", size="512x512", seed=14)
    assert np.array_equal(pixels, upstream(server.checkpoints["other"])(PROMPT, 512, 512, seed=14))
    assert not np.array_equal(pixels, generate(client, size="512x512", seed=14)[0])


def test_n_images_have_consecutive_seeds(client: httpx.Client) -> None:
    together = generate(client, size="512x512", seed=20, n=3)
    apart = [generate(client, size="512x512", seed=20 + i)[0] for i in range(3)]
    assert len(together) == 3
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(together[0], together[1])


def test_concurrent_requests_change_no_pixel(client: httpx.Client) -> None:
    source = (noise(512, 512),)
    requests: list[Callable[[], list[Pixels]]] = [
        lambda: generate(client, size="512x512", seed=30),
        lambda: generate(client, size="768x512", seed=30),
        lambda: generate(client, size="512x512", seed=31),
        lambda: edit(client, source, seed=30),
    ]
    alone = [request()[0] for request in requests]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(request) for request in requests * 2]
        together = [run.result()[0] for run in running]
    for one, other in zip(alone * 2, together, strict=True):
        assert np.array_equal(one, other)


def test_special_tokens_in_a_prompt_are_plain_text(client: httpx.Client) -> None:
    prompt = 'a <|image|> b <sop>1 1<eop> <|endoftext|> <|dit_token_257|> "</s><pad>"'
    (image,) = generate(client, prompt=prompt, size="512x512", seed=1)
    assert image.shape == (512, 512, 3)
    (edited,) = edit(client, (noise(512, 512),), prompt=prompt, seed=1)
    assert edited.shape == (512, 512, 3)
