"""A server with keys: slow bodies, the log's lines, and what the log must not contain."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from PIL import Image

from tests.http.conftest import KEY, OTHER_KEY, keys
from tests.polling import until
from tests.serve.conftest import Running, config_file, served, tiny_model

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "seed": 5}
CANARY = "canary-8f1e"


BODY_TIMEOUT_S = 2


@dataclass(frozen=True)
class Guarded:
    """A server that wants a key. Its model `broken` cannot be loaded."""

    running: Running
    key: str
    other_key: str

    @property
    def url(self) -> str:
        return self.running.url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    models = [
        tiny_model("guarded", prior={"min_replicas": 1}, decoder={"min_replicas": 1}),
        tiny_model("broken", checkpoint=str(folder / "nowhere")),
    ]
    config = config_file(folder, models, limits={"body_timeout_s": BODY_TIMEOUT_S}, auth=keys())
    with served(config, OTHER_KEY=OTHER_KEY) as running:
        yield Guarded(running, KEY, OTHER_KEY)


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


def ask(guarded: Guarded, *head: bytes) -> bytes:
    """Returns the answer to a request with some lines in its head. One of them ends the connection."""
    host, port = guarded.url.removeprefix("http://").split(":")
    body = json.dumps(SMALL).encode()
    lines = [
        b"POST /v1/images/generations HTTP/1.1",
        b"Host: x",
        b"Authorization: Bearer " + guarded.key.encode(),
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
        *head,
        b"",
        body,
    ]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"\r\n".join(lines))
        with connection.makefile("rb") as answer:
            return answer.read()


@pytest.mark.parametrize(
    "offer",
    [
        (b"Connection: Upgrade, HTTP2-Settings, close", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAAB"),
        (b"Connection: Upgrade, close", b"Upgrade: TLS/1.0, HTTP/1.1"),
        (b"Connection: close", b"Upgrade: websocket"),
    ],
)
def test_offers_of_another_protocol_are_ignored(guarded: Guarded, offer: tuple[bytes, ...]) -> None:
    """RFC 9110 (7.8). Java's HTTP client sends the first with every request."""
    answer = ask(guarded, *offer)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"X-Request-ID: b\xe4r", 200),
        (b"serve_multiplexed_model_id: b\xe4r", 200),
        (b"x-session-id: b\xe4r", 200),
        (b"traceparent: b\xe4r", 200),
        (b"x-request-timeout-seconds: b\xe4r", 400),
        (b"x-request-timeout-seconds: 0.000001", 400),
        (b"x-request-disconnect-disabled: b\xe4r", 400),
    ],
)
def test_headers_that_the_proxy_reads_do_not_fail_in_it(guarded: Guarded, header: bytes, status: int) -> None:
    answer = ask(guarded, b"Connection: close", header)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status), answer[:300]
    if status == 400:
        assert json.loads(body)["error"]["param"] == header.partition(b":")[0].decode()


def test_the_body_timeout_does_not_limit_generation(http: httpx.Client) -> None:
    answer = http.post("/v1/images/generations", json=SMALL | {"num_inference_steps": 60})
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > BODY_TIMEOUT_S, "the request must outlast the body timeout"


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
    until(lambda: any(line.get("status") == 401 for line in guarded.running.log_lines()))
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
