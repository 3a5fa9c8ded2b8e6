"""A server with keys and tight limits: slow bodies, rate limits, range requests and logs."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image

from tests.serve.conftest import BODY_TIMEOUT_S, Guarded, until

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "seed": 5}
CANARY = "canary-8f1e"


@pytest.fixture
def http(guarded: Guarded) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {guarded.key}"}
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=60) as http:
        yield http


def test_a_slow_body_times_out(guarded: Guarded) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = [
            "POST /v1/images/generations HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {guarded.key}",
            "Content-Type: application/json",
            "Content-Length: 1000",
        ]
        connection.sendall("\r\n".join([*head, "", '{"prompt": "']).encode())
        began = time.monotonic()
        connection.settimeout(0.2)
        answer = b""
        while not answer:
            assert time.monotonic() - began < BODY_TIMEOUT_S + 10
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                connection.sendall(b"x")
        assert time.monotonic() - began >= BODY_TIMEOUT_S
        connection.settimeout(10)
        while b"}}" not in answer:
            answer += connection.recv(4096)
        head_, _, body = answer.partition(b"\r\n\r\n")
        assert head_.startswith(b"HTTP/1.1 408")
        assert json.loads(body)["error"]["code"] == "request_timeout"


def test_the_body_timeout_does_not_limit_generation(http: httpx.Client) -> None:
    answer = http.post("/v1/images/generations", json=SMALL | {"num_inference_steps": 60})
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > BODY_TIMEOUT_S, "the request must outlast the body timeout"


def test_a_rate_limited_client_gets_a_retry_after_header(guarded: Guarded) -> None:
    guarded.use_up_other_key()
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
    guarded: Guarded, kind: type[openai.APIStatusError], status: int, fields: dict[str, str]
) -> None:
    """The client's own retries are on. The server must prevent them after a failed generation."""
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.key) as sdk:
        with pytest.raises(kind) as caught:
            sdk.images.generate(**fields, extra_headers={"X-Request-ID": f"tried-{status}"})  # type: ignore[call-overload]
        assert caught.value.status_code == status
        assert caught.value.request_id == f"tried-{status}"
        until(lambda: attempts(guarded, f"tried-{status}") > 0)
        assert attempts(guarded, f"tried-{status}") == 1


def attempts(guarded: Guarded, request_id: str) -> int:
    return sum(
        line.get("request_id") == request_id and "route" in line for line in guarded.running.log_lines()
    )


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


def test_each_request_is_logged_as_json(http: httpx.Client, guarded: Guarded) -> None:
    assert (
        http.post("/v1/images/generations", json=SMALL, headers={"X-Request-ID": "explained"}).status_code
        == 200
    )
    assert http.get("/v1/models/x", headers={"X-Request-ID": "refused"}).status_code == 404

    def lines() -> dict[object, dict[str, object]]:
        return {line.get("request_id"): line for line in guarded.running.log_lines() if "route" in line}

    until(lambda: {"explained", "refused"} <= lines().keys(), 10)
    made, refused = lines()["explained"], lines()["refused"]
    assert {
        key: made[key] for key in ("method", "route", "status", "key_id", "n", "size", "steps", "sources")
    } == {
        "method": "POST",
        "route": "/v1/images/generations",
        "status": 200,
        "key_id": "by-hash",
        "n": 1,
        "size": [512, 512],
        "steps": 2,
        "sources": 0,
    }
    stages = [made[key] for key in ("waiting_s", "prior_s", "decoder_s")]
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in stages)
    assert 0 < sum(stages) <= made["seconds"]  # type: ignore[arg-type, operator]
    assert (refused["route"], refused["status"]) == ("/v1/models/{name}", 404)
    assert refused["error"] == "model_not_found"


def test_logs_contain_no_prompt_image_key_or_path(http: httpx.Client, guarded: Guarded) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "PNG")
    picture = file.getvalue()
    fields = {"prompt": f"a {CANARY}", "size": "512x512", "num_inference_steps": "2"}
    inline = SMALL | {"response_format": "b64_json"}
    sent = base64.b64encode(picture).decode()
    by_url = {"prompt": "a boat", "num_inference_steps": 2, "size": "512x512"}
    answers = [
        http.post("/v1/images/generations", json=inline | {"prompt": f"a {CANARY}"}),
        http.post("/v1/images/generations", json=SMALL | {"prompt": f"a {CANARY}", "model": "broken"}),
        http.post("/v1/images/generations", json=SMALL | {CANARY: CANARY}),
        http.post("/v1/images/generations", json=SMALL | {"model": CANARY}),
        http.post("/v1/images/generations", content=f'{{"prompt": "{CANARY}'.encode()),
        http.post("/v1/images/edits", data=fields, files={"image": (CANARY, picture)}),
        http.post("/v1/images/edits", data=fields, files={"image": (CANARY, CANARY.encode())}),
        http.post(
            "/v1/images/edits", data=fields | {"user": CANARY * 100}, files={"image": (CANARY, picture)}
        ),
        http.post(
            "/v1/images/edits", json=by_url | {"images": [{"image_url": f"data:image/png;base64,{sent}"}]}
        ),
        http.post(
            "/v1/images/edits", json=by_url | {"images": [{"image_url": f"http://127.0.0.1/{CANARY}"}]}
        ),
        http.get(f"/v1/models/{CANARY}"),
        http.get(f"/files/{CANARY}.png"),
        http.get(f"/{CANARY}?{CANARY}={CANARY}"),
        http.post(
            "/v1/images/jobs",
            json=SMALL
            | {"prompt": f"a {CANARY}", "images": [{"image_url": f"data:image/png;base64,{sent}"}]},
            headers={"Idempotency-Key": CANARY},
        ),
        http.post("/v1/images/jobs", json=SMALL | {"webhook_url": f"http://127.0.0.1/{CANARY}"}),
        http.get(f"/v1/images/jobs/{CANARY}"),
        http.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}"}),
    ]
    job = answers[-4].json()["id"]
    until(lambda: http.get(f"/v1/images/jobs/{job}").json()["status"] == "succeeded")
    assert [answer.status_code for answer in answers] == [
        *(200, 500, 400, 404, 400),
        *(200, 400, 400, 200, 400),
        *(404, 404, 404),
        *(202, 400, 404, 401),
    ]
    until(lambda: any(" 401 in" in line for line in guarded.running.log))
    written = "".join(guarded.running.log)
    for log in guarded.running.logs().rglob("*"):
        if log.is_file():
            written += log.read_text(errors="replace")
    assert "POST /v1/images/generations 200" in written
    received = answers[0].json()["data"][0]["b64_json"]
    images = (sent[100:150], received[1000:1050], repr(picture[50:70])[2:-1])
    for secret in (CANARY, guarded.key, guarded.other_key, *images):
        found = re.search(f".*{re.escape(secret)}.*", written)
        assert not found, found[0]
