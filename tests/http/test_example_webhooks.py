"""The receivers of webhooks in `examples/webhooks`: in use, and under attack."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serve_app.config import AppConfig
from tests.http.conftest import ROOT, Endpoint, keys, served
from tests.polling import until

EXAMPLES = ROOT / "examples"
PAIRS = {"webhooks/receiver.py": "webhooks/submit.sh", "webhooks/fal_receiver.py": "webhooks/fal_submit.sh"}
"""Each receiver, and the program that sends it a job."""
RECEIVERS = list(PAIRS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Receiving:
    """A running receiver.

    Attributes:
        url: its address.
    """

    def __init__(self, port: int, output: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self._output = output

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def post(self, headers: dict[str, str], body: bytes) -> int:
        return httpx.post(self.url, headers=headers, content=body).status_code


@contextmanager
def receiving(file: str, server: str, port: int, folder: Path) -> Iterator[Receiving]:
    """Runs a receiver until the block ends."""
    receiver = Receiving(port, folder / "output")
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / file],
            stdout=output,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"SERVER": server, "PORT": str(port)},
        )
    try:
        until(lambda: process.poll() is not None or f"Listening at {receiver.url}" in receiver.printed)
        assert process.poll() is None
        yield receiver
        assert process.poll() is None, "a message must not end it"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("file", RECEIVERS)
def test_a_receiver_prints_the_job(file: str, tmp_path: Path) -> None:
    port = free_port()
    allowed = {"allow": [f"127.0.0.1:{port}"]}
    with (
        served(tmp_path, "glm-image", auth=keys(), outbound=allowed) as server,
        receiving(file, server.url, port, tmp_path) as receiver,
    ):
        submitted = submit(PAIRS[file], server, receiver.url)
        assert submitted.returncode == 0, submitted.stderr
        job = json.loads(submitted.stdout)
        until(lambda: "/files/" in receiver.printed, timeout_s=60)
        shown = receiver.printed
        if file == "webhooks/receiver.py":
            assert f'image.job.succeeded {{\n  "id": "{job["id"]}"' in shown
        else:
            assert f'OK {job["request_id"]} {{\n  "images": [' in shown
        with server.client() as client:
            (url,) = re.findall(rf"{server.url}/files/\S+?(?=\")", shown)
            assert client.get(url).status_code == 200


@pytest.mark.parametrize("file", RECEIVERS)
def test_an_address_that_is_not_allowed_is_refused(file: str, tmp_path: Path) -> None:
    with served(tmp_path, "glm-image", auth=keys()) as server:
        refused = submit(PAIRS[file], server, "http://127.0.0.1:9000/")
    assert refused.returncode != 0
    assert "does not lead to a public address" in refused.stdout


def submit(program: str, server: Endpoint, webhook: str) -> subprocess.CompletedProcess[str]:
    """Submits a job with a webhook."""
    return subprocess.run(
        ["bash", EXAMPLES / program],
        env=os.environ | {"SERVER": server.url, "KEY": server.key, "WEBHOOK": webhook},
        capture_output=True,
        text=True,
        check=False,
    )


class Signer:
    """Signs messages as the server does."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    @contextmanager
    def publishing(self) -> Iterator[str]:
        """Serves the public key, and yields the base URL."""
        public = base64.urlsafe_b64encode(self._key.public_key().public_bytes_raw()).decode().rstrip("=")
        jwks = json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": public, "kid": "1"}]}).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/.well-known/jwks.json" else 404)
                self.end_headers()
                self.wfile.write(jwks)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()

    def message(self, file: str, message_id: str, age_s: float = 0) -> tuple[dict[str, str], bytes]:
        """Returns the headers and the body of a message for a receiver."""
        sent_at = str(int(time.time() - age_s))
        if file == "webhooks/receiver.py":
            body = json.dumps({"type": "image.job.succeeded", "data": {"id": message_id}}).encode()
            signature = base64.b64encode(self._key.sign(f"{message_id}.{sent_at}.".encode() + body)).decode()
            return {
                "webhook-id": message_id,
                "webhook-timestamp": sent_at,
                "webhook-signature": f"v1,c29tZXRoaW5n v1a,{signature}",
            }, body
        body = json.dumps({"status": "OK", "request_id": message_id, "payload": {}}).encode()
        lines = (message_id, "alice", sent_at, hashlib.sha256(body).hexdigest())
        values = (*lines[:3], self._key.sign("\n".join(lines).encode()).hex())
        names = ("Request-Id", "User-Id", "Timestamp", "Signature")
        return {f"X-Fal-Webhook-{name}": value for name, value in zip(names, values, strict=True)}, body


@pytest.fixture(params=RECEIVERS)
def file(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def signer() -> Signer:
    return Signer()


@pytest.fixture
def receiver(file: str, signer: Signer, tmp_path: Path) -> Iterator[Receiving]:
    with signer.publishing() as url, receiving(file, url, free_port(), tmp_path) as receiver:
        yield receiver


def test_a_repeated_message_is_handled_once(file: str, signer: Signer, receiver: Receiving) -> None:
    first = signer.message(file, "job-1", age_s=240)
    again = signer.message(file, "job-1")
    other = signer.message(file, "job-2")
    assert [receiver.post(*message) for message in (first, first, again, other)] == [204] * 4
    assert (receiver.printed.count("job-1"), receiver.printed.count("job-2")) == (1, 1)


@pytest.mark.parametrize("age_s", [330, -330])
def test_an_old_message_is_rejected(file: str, signer: Signer, receiver: Receiving, age_s: int) -> None:
    assert receiver.post(*signer.message(file, "job-1", age_s)) == 400
    assert receiver.post(*signer.message(file, "job-1")) == 204, "it must not count as handled"
    assert receiver.printed.count("job-1") == 1


def test_a_forged_message_is_rejected(file: str, signer: Signer, receiver: Receiving) -> None:
    headers, body = signer.message(file, "job-1")
    stranger, its_body = Signer().message(file, "job-1")
    assert receiver.post(stranger, its_body) == 401
    assert receiver.post(headers, body.replace(b"job-1", b"job-2")) == 401
    assert receiver.post({}, body) == 401
    for name in headers:
        assert receiver.post(headers | {name: headers[name] + "0"}, body) == 401, name
        assert receiver.post(headers | {name: ""}, body) == 401, name
        assert receiver.post(headers | {name: "nonsense, nonsense v1a v1a,x"}, body) == 401, name
    assert "job" not in receiver.printed
    assert receiver.post(headers, body) == 204


def test_an_unreasonable_length_is_rejected(receiver: Receiving) -> None:
    place = receiver.url.removeprefix("http://").rstrip("/").split(":")
    for length in ("-1", str(2**40)):
        with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
            connection.sendall(f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
            assert b" 413 " in connection.recv(1000)


def test_the_readme_shows_how_to_allow_a_receiver() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", (EXAMPLES / "README.md").read_text(), re.M | re.S)
    args: dict[str, Any] = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())["applications"][0]["args"]
    config = AppConfig.model_validate(args | yaml.safe_load(block))
    assert list(config.outbound.allow) == ["127.0.0.1:9000"]
    for program in PAIRS.values():
        assert "WEBHOOK:-http://127.0.0.1:9000/" in (EXAMPLES / program).read_text()
    for receiver in RECEIVERS:
        assert 'os.environ.get("PORT", "9000")' in (EXAMPLES / receiver).read_text()
