"""The official `fal_client`, unmodified. It supports only HTTPS, so the server uses TLS."""

import base64
import hashlib
import importlib
import io
import json
import logging
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPSConnection
from typing import Any

import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from PIL import Image

from tests.http.conftest import Endpoint
from tests.pictures import picture
from tests.polling import until

APP = "fal-ai/glm-image"
SMALL = {"prompt": "a boat", "image_size": "square", "num_inference_steps": 10, "seed": 5}
LONG = SMALL | {"image_size": {"width": 2048, "height": 2048}, "num_inference_steps": 100, "num_images": 4}


@pytest.fixture(scope="module")
def fal(vendors: Endpoint) -> Iterator[Any]:
    """The `fal_client` module. It reads its host settings when it is imported."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (vendors.environment | {"FAL_KEY": vendors.key}).items():
            environment.setenv(name, value)
        assert "fal_client" not in sys.modules
        module = importlib.import_module("fal_client")
        yield module
        module.sync_client._client.close()


@pytest.fixture
def http(vendors: Endpoint) -> Iterator[httpx.Client]:
    with vendors.client(authorization=f"Key {vendors.key}") as client:
        yield client


@pytest.fixture
def busy(fal: Any) -> Iterator[None]:
    """Fills the prior stage with images, and queues jobs behind them."""
    handles = [fal.submit(APP, arguments=LONG) for _ in range(5)]
    until(lambda: isinstance(handles[1].status(), fal.InProgress))
    yield
    for handle in handles:
        handle.cancel()
    until(lambda: all(isinstance(handle.status(), fal.Completed) for handle in handles))


@pytest.fixture
def crowd(vendors: Endpoint, http: httpx.Client) -> Iterator[None]:
    """Fills the prior stage with images that somebody waits for."""

    def units() -> int:
        return len(http.get("/v1/internal/status").json()["units"])

    url, trust = httpx.URL(vendors.url), ssl.create_default_context(cafile=vendors.certificate)
    connections = [HTTPSConnection(url.host, url.port, context=trust) for _ in range(3)]
    headers = {"Content-Type": "application/json", "Authorization": f"Key {vendors.key}"}
    for connection in connections:
        connection.request("POST", f"/{APP}", json.dumps(LONG), headers)
    until(lambda: units() == 12)
    yield
    http.post("/v1/internal/unload?force=true").raise_for_status()
    for connection in connections:
        connection.close()


def test_run_returns_images(fal: Any, http: httpx.Client) -> None:
    made = fal.run(APP, arguments=SMALL | {"num_images": 2})
    assert made.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert (made["seed"], made["prompt"], made["has_nsfw_concepts"]) == (5, "a boat", [False, False])
    assert made["timings"]["inference"] > 0
    for image in made["images"]:
        file = http.get(image["url"], headers={"Authorization": ""}).content
        assert (image["content_type"], image["file_size"]) == ("image/jpeg", len(file))
        assert (image["width"], image["height"]) == Image.open(io.BytesIO(file)).size == (512, 512)
        assert image["url"].endswith(image["file_name"])


def test_subscribe_reports_progress(fal: Any) -> None:
    updates: list[Any] = []
    ids: list[str] = []
    made = fal.subscribe(
        f"{APP}/image-to-image",
        # Long enough to be seen in progress by a client that polls every 100 ms.
        arguments=SMALL
        | {
            "image_urls": [fal.encode_image(Image.new("RGB", (512, 512), "red"))],
            "num_inference_steps": 50,
        },
        with_logs=True,
        on_queue_update=updates.append,
        on_enqueue=ids.append,
    )
    assert made["images"][0]["width"] == 512
    assert isinstance(updates[-1], fal.Completed)
    assert [line["message"] for line in updates[-1].logs] == [
        "began",
        "image 0: prior stage",
        "image 0: decoder stage",
        "succeeded",
    ]
    assert {line["level"] for line in updates[-1].logs} == {"INFO"}
    assert 0 < updates[-1].metrics["inference_time"] < 60
    assert any(isinstance(update, fal.InProgress) for update in updates)
    assert fal.result(APP, ids[0]) == made
    assert fal.status(APP, ids[0]) == fal.Completed(logs=[], metrics=updates[-1].metrics)


def test_requests_are_queued_by_priority(fal: Any, busy: None) -> None:
    low = fal.submit(APP, arguments=SMALL, priority="low")
    normal = fal.submit(APP, arguments=SMALL)
    ahead = normal.status().position
    assert low.status().position == ahead + 1
    with pytest.raises(fal.FalClientHTTPError, match="still in progress") as caught:
        fal.client._request(low.client, "GET", low.response_url)  # `get` would wait
    assert caught.value.status_code == 400
    for handle in (low, normal):
        handle.cancel()
        assert isinstance(handle.status(), fal.Completed)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_cancelling_stops_a_running_request(
    fal: Any, vendors: Endpoint, http: httpx.Client, stage: str
) -> None:
    handle = fal.submit(APP, arguments=LONG | {"num_images": 1, "image_size": "square_hd"})
    until(lambda: f"image 0: {stage} stage" in messages(handle.status(with_logs=True)))
    began = time.monotonic()
    handle.cancel()
    until(lambda: isinstance(handle.status(), fal.Completed))
    assert time.monotonic() - began < 10
    assert handle.status().error_type == "client_cancelled"
    with pytest.raises(fal.FalClientHTTPError, match="was cancelled") as caught:
        handle.get()
    assert (caught.value.status_code, caught.value.error_type) == (499, "client_cancelled")
    again = http.put(f"{handle.status_url.removesuffix('/status')}/cancel")
    assert (again.status_code, again.json()) == (400, {"status": "ALREADY_COMPLETED"})
    other = handle.cancel_url.replace(handle.request_id, "01a20ca2-4fb3-7379-bb05-17c2842cbc3c")
    unknown = http.put(other)
    assert (unknown.status_code, unknown.json()) == (404, {"status": "NOT_FOUND"})


def messages(status: Any) -> list[str]:
    """Returns the log's messages. There is no log before the request is in progress."""
    return [line["message"] for line in getattr(status, "logs", ())]


def test_a_client_timeout_cancels_the_request(fal: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    ids: list[str] = []
    with pytest.raises(fal.FalClientTimeoutError):
        fal.subscribe(APP, arguments=LONG, client_timeout=2, on_enqueue=ids.append)
    until(lambda: isinstance(fal.status(APP, ids[0]), fal.Completed))
    assert fal.status(APP, ids[0]).error_type == "client_cancelled"
    # A thread of the client goes on polling, and asks for the result last. The next test counts requests.
    until(lambda: any("/requests/{request_id} 499 " in line for line in caplog.messages))


def test_a_start_timeout_fails_without_a_retry(fal: Any, crowd: None, sent: list[str]) -> None:
    with pytest.raises(fal.FalClientHTTPError, match=r"did not start within 1\.5 s") as caught:
        fal.run(APP, arguments=SMALL, start_timeout=1.5)
    assert (caught.value.status_code, caught.value.error_type) == (504, "request_timeout")
    assert caught.value.response_headers["x-fal-request-timeout-type"] == "user"
    assert sent == [f"POST /{APP}"]
    handle = fal.submit(APP, arguments=SMALL, start_timeout=1.5)
    until(lambda: isinstance(handle.status(), fal.Completed))
    assert handle.status().error_type == "request_timeout"
    with pytest.raises(fal.FalClientHTTPError) as caught:
        handle.get()
    assert (caught.value.status_code, caught.value.error_type) == (504, "request_timeout")


def test_invalid_input_raises_with_its_location(fal: Any, sent: list[str]) -> None:
    for wrong, location, kind in (
        ({"num_images": 5}, ["body", "num_images"], "value_error"),
        ({"num_inference_steps": 9}, ["body", "num_inference_steps"], "value_error"),
        ({"guidance_scale": 0.5}, ["body", "guidance_scale"], "value_error"),
        ({"image_size": "huge"}, ["body", "image_size"], "value_error"),
        ({"image_size": {"width": 512, "height": 9}}, ["body", "image_size", "height"], "value_error"),
        ({"output_format": "webp"}, ["body", "output_format"], "value_error"),
        ({"acceleration": "high"}, ["body", "acceleration"], "extra_forbidden"),
        ({"enable_prompt_expansion": True}, ["body", "enable_prompt_expansion"], "extra_forbidden"),
        ({"prompt": None}, ["body", "prompt"], "value_error"),
        ({"prompt": " "}, ["body", "prompt"], "value_error"),
    ):
        with pytest.raises(fal.FalClientHTTPError) as caught:
            fal.run(APP, arguments=SMALL | wrong)
        assert caught.value.status_code == 422
        (problem,) = caught.value.message
        assert (problem["loc"], problem["type"]) == (location, kind)
    assert len(sent) == 10, "the client must not retry"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://localhost/boat.png", "file_download_error"),
        ("data:image/png;base64,bm90aGluZw==", "image_load_error"),
    ],
)
def test_an_invalid_source_image_is_reported(fal: Any, url: str, kind: str) -> None:
    with pytest.raises(fal.FalClientHTTPError) as caught:
        fal.run(f"{APP}/image-to-image", arguments=SMALL | {"image_urls": url})
    (problem,) = caught.value.message
    assert (problem["loc"], problem["type"]) == (["body", "image_urls"], kind)


def test_a_load_failure_is_not_retried(fal: Any, sent: list[str]) -> None:
    with pytest.raises(fal.FalClientHTTPError, match="Model loading failed") as caught:
        fal.run("fal-ai/broken", arguments=SMALL)
    assert (caught.value.status_code, caught.value.error_type) == (500, "internal_error")
    assert len(sent) == 1
    with pytest.raises(fal.FalClientHTTPError, match="Model loading failed"):
        fal.subscribe("fal-ai/broken", arguments=SMALL)
    assert sent.count("POST /queue/fal-ai/broken") == 1


def test_a_wrong_key_or_an_unknown_app_raises(fal: Any) -> None:
    for client, app, status in (
        (fal.SyncClient(key="wrong"), APP, 401),
        (fal.SyncClient(), "fal-ai/nothing", 404),
        (fal.SyncClient(), "another/glm-image", 404),
    ):
        with pytest.raises(fal.FalClientHTTPError) as caught:
            client.run(app, arguments=SMALL)
        client._client.close()
        assert caught.value.status_code == status


@pytest.mark.parametrize("outcome", ["OK", "ERROR"])
def test_webhooks_are_signed(fal: Any, vendors: Endpoint, http: httpx.Client, outcome: str) -> None:
    receiver = vendors.receiver
    app = APP if outcome == "OK" else "fal-ai/broken"
    handle = fal.submit(app, arguments=SMALL, webhook_url=receiver.url)
    until(lambda: any(handle.request_id.encode() in body for _, body in receiver.came))
    headers, body = next(one for one in receiver.came if handle.request_id.encode() in one[1])
    message = json.loads(body)
    assert message["request_id"] == message["gateway_request_id"] == handle.request_id
    assert message["status"] == outcome
    if outcome == "OK":
        assert message["error"] is None
        assert message["payload"] == handle.get()
    else:
        assert message["error"] == "Invalid status code: 500"
        assert "Model loading failed" in message["payload"]["detail"]
    signature = bytes.fromhex(headers["X-Fal-Webhook-Signature"])
    names = ("Request-Id", "User-Id", "Timestamp")
    lines = [headers[f"X-Fal-Webhook-{name}"] for name in names] + [hashlib.sha256(body).hexdigest()]
    assert lines[:2] == [handle.request_id, "by-hash"]
    assert abs(int(lines[2]) - time.time()) < 300
    (key,) = http.get("/.well-known/jwks.json", headers={"Authorization": ""}).json()["keys"]
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "=="))
    public.verify(signature, "\n".join(lines).encode())
    with pytest.raises(InvalidSignature):
        public.verify(signature, "\n".join([*lines[:3], hashlib.sha256(body + b" ").hexdigest()]).encode())


def test_a_webhook_to_a_disallowed_address_is_rejected(fal: Any) -> None:
    with pytest.raises(fal.FalClientHTTPError) as caught:
        fal.submit(APP, arguments=SMALL, webhook_url="http://127.0.0.1:1/hook")
    (problem,) = caught.value.message
    assert problem["loc"] == ["query", "fal_webhook"]


ASYNCHRONOUS = """
import asyncio, fal_client

async def main():
    arguments = {"prompt": "a boat", "image_size": "square", "num_inference_steps": 10, "sync_mode": True}
    handle = await fal_client.submit_async("fal-ai/glm-image", arguments=arguments)
    kinds = [type(event) async for event in handle.iter_events(with_logs=True)]
    assert kinds[-1] is fal_client.Completed
    made = await handle.get()
    print(made["images"][0]["url"])

asyncio.run(main())
"""


def test_the_asynchronous_client_works(vendors: Endpoint) -> None:
    run = subprocess.run(  # in a separate process, because the client leaves connections open
        [sys.executable, "-c", ASYNCHRONOUS],
        env=os.environ | vendors.environment | {"FAL_KEY": vendors.key},
        check=True,
        capture_output=True,
        text=True,
    )
    kind, _, data = run.stdout.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 512)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_an_invalid_timeout_is_rejected(http: httpx.Client, value: str) -> None:
    answer = http.post(f"/{APP}", json=SMALL, headers={"X-Fal-Request-Timeout": value})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert [part.lower() for part in problem["loc"]] == ["header", "x-fal-request-timeout"]


def start_upload(http: httpx.Client) -> Any:
    body = {"content_type": "image/png", "file_name": "a.png"}
    answer = http.post("/storage/upload/initiate", json=body, params={"storage_type": "fal-cdn-v3"})
    assert answer.status_code == 200
    return answer.json()


def test_an_upload_url_accepts_one_image_without_a_key(vendors: Endpoint, http: httpx.Client) -> None:
    upload = start_upload(http)
    with vendors.client() as anonymous:
        assert anonymous.put(upload["upload_url"], content=picture()).status_code == 200
        stored = anonymous.get(upload["file_url"])
        assert (stored.content, stored.headers["content-type"]) == (picture(), "application/octet-stream")
        assert anonymous.put(upload["upload_url"], content=picture()).status_code == 409
        other = start_upload(http)["upload_url"]
        for wrong, status in (
            (other.replace("signature=", "signature=0")[:-1], 403),
            (other.replace("expires=1", "expires=2"), 403),
            (other.partition("?")[0], 422),
            (upload["upload_url"].partition("?")[0] + "?" + other.partition("?")[2], 403),
        ):
            assert anonymous.put(wrong, content=picture()).status_code == status
        no_image = anonymous.put(other, content=b"<svg/>")
        assert no_image.status_code == 422
        assert no_image.json()["detail"][0]["type"] == "image_load_error"
        assert anonymous.put(other, content=picture() + b" " * 2**22).status_code == 413
        assert anonymous.put(other, content=picture()).status_code == 200, "a failure must not use up the URL"


def test_the_proxy_rejects_other_targets(http: httpx.Client) -> None:
    for target in (
        None,
        "https://example.com/fal-ai/glm-image",
        "https://fal.run/v1/internal/unload",
        "https://fal.run.example.com/fal-ai/glm-image",
        "https://rest.fal.ai/fal-ai/glm-image",
        "//fal.run/../v1/models",
    ):
        headers = {"x-fal-target-url": target} if target else {}
        answer = http.post("/api/fal/proxy", json=SMALL, headers=headers)
        assert answer.status_code == 412, target
        assert answer.json()["error_type"] == "precondition_failed"
