"""A server with keys and tight limits: rate limits, range requests, and the errors of OpenAI's client."""

import io
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image

from tests.http.conftest import Endpoint, use_up_other_key

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "seed": 5}


@pytest.fixture
def http(guarded: Endpoint) -> Iterator[httpx.Client]:
    with guarded.client(authorization=f"Bearer {guarded.key}") as http:
        yield http


def test_a_rate_limited_client_gets_a_retry_after_header(guarded: Endpoint) -> None:
    use_up_other_key(guarded)
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.other_key, max_retries=0) as sdk:
        with pytest.raises(openai.RateLimitError) as caught:
            sdk.images.generate(prompt="a boat", size="512x512", extra_body={"num_inference_steps": 100})
        assert caught.value.type == "rate_limit_error"
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.key, max_retries=0) as sdk:
        sdk.images.generate(prompt="a boat", size="512x512", extra_body={"num_inference_steps": 2})


def test_a_request_above_max_megapixel_steps_is_rejected(http: httpx.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a boat", "n": 10})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "n"
    assert "10 images of 1024x1024 with 50 denoising steps are 524 megapixel-steps" in error["message"]


@pytest.mark.parametrize(
    ("kind", "status", "fields"),
    [
        (openai.BadRequestError, 400, {"prompt": ""}),
        (openai.NotFoundError, 404, {"prompt": "a boat", "model": "dall-e-9"}),
        (openai.APIStatusError, 413, {"prompt": "x" * 2**20}),
        (openai.InternalServerError, 500, {"prompt": "a boat", "model": "broken", "size": "512x512"}),
    ],
)
def test_the_openai_client_raises_the_error_of_each_status(
    guarded: Endpoint,
    kind: type[openai.APIStatusError],
    status: int,
    fields: dict[str, str],
) -> None:
    """The client's own retries are on. The server must prevent them after a failed generation."""
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.key) as sdk:
        with pytest.raises(kind) as caught:
            sdk.images.generate(**fields, extra_headers={"X-Request-ID": f"tried-{status}"})  # type: ignore[call-overload]
        assert caught.value.status_code == status
        assert caught.value.request_id == f"tried-{status}"
    assert guarded.request_ids.count(f"tried-{status}") == 1


def test_files_support_range_requests(http: httpx.Client) -> None:
    (image,) = http.post("/v1/images/generations", json=SMALL).json()["data"]
    whole = http.get(image["url"])
    data, size = whole.content, len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    for requested, start, end in (
        ("0-99", 0, 100),
        (f"100-{size * 2}", 100, size),
        ("1000-", 1000, size),
        ("-10", size - 10, size),
    ):
        part = http.get(image["url"], headers={"Range": f"bytes={requested}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert part.headers["content-type"] == "image/png"
        assert part.content == data[start:end]
    for unsatisfiable in (f"{size}-", "-0"):
        rejected = http.get(image["url"], headers={"Range": f"bytes={unsatisfiable}"})
        assert rejected.status_code == 416
        assert rejected.headers["content-range"] == f"bytes */{size}"
        assert rejected.json()["error"]["message"]
    for invalid in (
        "bytes=5-1",
        "bytes=-",
        "bytes=0-1,5-6",
        "lines=1-2",
        "bytes=a-b",
        "bytes=" + "9" * 5000 + "-",
    ):
        answer = http.get(image["url"], headers={"Range": invalid})
        assert (answer.status_code, answer.content) == (200, data)
    changed = http.get(image["url"], headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert changed.content == data
    same = http.get(image["url"], headers={"Range": "bytes=0-9", "If-Range": whole.headers["etag"]})
    assert same.content == data[:10]
    assert http.head("/v1/internal/unload").status_code == 405
    head = http.head(image["url"])
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(size)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_without_a_name_is_a_file(http: httpx.Client, kind: str) -> None:
    """RFC 7578 (4.2) leaves the name optional."""
    file = io.BytesIO()
    Image.effect_noise((512, 512), 80).convert("RGB").save(file, kind)
    made = [
        http.post(
            "/v1/images/edits",
            data=SMALL | {"response_format": "b64_json"},
            files={"image": (name, file.getvalue(), f"image/{kind.lower()}")},
        )
        for name in (None, "boat")
    ]
    assert made[0].json()["data"] == made[1].json()["data"]
