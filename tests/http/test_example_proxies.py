"""The proxies' configurations in `examples/proxy`, in the real programs, in front of a server without Ray."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.config import Limits
from serve_app.http.tls import self_signed
from tests.conftest import needs_caddy, needs_jq, needs_nginx
from tests.http import stages
from tests.http.conftest import ROOT, Endpoint, keys, served
from tests.pictures import opened
from tests.polling import until

EXAMPLES = ROOT / "examples"
NGINX, CADDY = "proxy/nginx.conf", "proxy/Caddyfile"
SLOW = {"prompt": "a boat", "size": "2048x2048", "num_inference_steps": 100}
"""An image of 14 seconds."""


@dataclass(frozen=True)
class Places:
    """Ports and files that replace those of an example."""

    folder: Path
    port: int
    upstream: str
    certificate: Path
    private: Path


def replaced(text: str, pairs: dict[str, str]) -> str:
    """Replaces texts, each of which must be there."""
    for old, new in pairs.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx(places: Places, change: Callable[[str], str]) -> list[str]:
    """Writes nginx's files, and returns the command that runs it."""
    site = replaced(
        change((EXAMPLES / NGINX).read_text()),
        {
            "listen 80;": f"listen 127.0.0.1:{free_port()};",
            "listen 443 ": f"listen 127.0.0.1:{places.port} ",
            "images.example.com;": "localhost;",
            "http://127.0.0.1:8000;": f"http://{places.upstream};",
            "/etc/ssl/images.example.com/fullchain.pem": str(places.certificate),
            "/etc/ssl/images.example.com/privkey.pem": str(places.private),
        },
    )
    (places.folder / "site.conf").write_text(site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {places.folder}/{kind};" for kind in kinds)
    (places.folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {places.folder}/pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {temporary} include {places.folder}/site.conf; }}"
    )
    return ["nginx", "-p", str(places.folder), "-c", "nginx.conf", "-e", "stderr"]


def caddy(places: Places, change: Callable[[str], str]) -> list[str]:
    """Writes Caddy's file, and returns the command that runs it."""
    site = replaced(
        change((EXAMPLES / CADDY).read_text()),
        {
            "images.example.com {": f"https://localhost:{places.port} {{\n"
            f"\tbind 127.0.0.1\n\ttls {places.certificate} {places.private}",
            "127.0.0.1:8000": places.upstream,
        },
    )
    (places.folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + site)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(places.folder / "Caddyfile")]


KINDS = {NGINX: nginx, CADDY: caddy}
MARKED = [pytest.param(NGINX, marks=needs_nginx), pytest.param(CADDY, marks=needs_caddy)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def proxied(folder: Path, kind: str, change: Callable[[str], str] = str) -> Iterator[Endpoint]:
    """Serves behind a proxy until the block ends.

    Args:
        folder: folder of all files.
        kind: the proxy's file in `examples`.
        change: makes a change to that file.
    """
    port = free_port()
    certificate, private = self_signed(folder / "proxy-tls", "localhost")
    url = f"https://localhost:{port}"
    defaults = {"steps": 60, "width": 512, "height": 512}
    with served(folder, "glm-image", defaults=defaults, auth=keys(), public_url=url) as server:
        places = Places(folder, port, server.place, certificate, private)
        with (folder / "log").open("w") as log:
            command = KINDS[kind](places, change)
            proxy = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"HOME": str(folder)}, cwd=folder
            )
        try:
            until(lambda: proxy.poll() is not None or answers(port))
            assert proxy.poll() is None, (folder / "log").read_text()
            yield Endpoint(url, server.key, server.other_key, certificate)
        finally:
            proxy.terminate()
            proxy.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", params=MARKED)
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with proxied(tmp_path_factory.mktemp("proxy"), request.param) as endpoint:
        yield endpoint


@pytest.fixture
def client(proxy: Endpoint) -> Iterator[httpx.Client]:
    with proxy.client(authorization=f"Bearer {proxy.key}") as client:
        yield client


def test_an_answers_url_leads_through_the_proxy(client: httpx.Client, proxy: Endpoint) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "a boat"})
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    assert image["url"].startswith(f"{proxy.url}/files/")
    assert opened(client.get(image["url"]).content).size == (512, 512)


def test_events_arrive_one_at_a_time(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DECODER_SECONDS", 0.1)  # 1.6 s for 60 steps
    body = {"prompt": "a boat", "stream": True, "partial_images": 3}
    with client.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        came = [(time.monotonic(), line) for line in answer.iter_lines() if line.startswith("data: ")]
    kinds = [json.loads(line[6:])["type"].rpartition(".")[2] for _, line in came]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    # The previews are those of each quarter of the steps.
    assert all(later - earlier > 0.1 for (earlier, _), (later, _) in itertools.pairwise(came))


def test_a_jobs_events_arrive_before_its_end(client: httpx.Client) -> None:
    job = client.post("/v1/images/jobs", json=SLOW).json()
    with client.stream("GET", f"/v1/images/jobs/{job['id']}/events") as answer:
        first = next(line for line in answer.iter_lines() if line.startswith("data: "))
    assert json.loads(first[6:])["status"] in ("queued", "running")
    assert client.delete(f"/v1/images/jobs/{job['id']}").status_code == 200


def test_an_edit_of_several_megabytes_is_accepted(client: httpx.Client) -> None:
    drawing = io.BytesIO()
    Image.new("RGB", (1600, 1600), "red").save(drawing, "PNG", compress_level=0)
    assert drawing.tell() > 7e6
    sources = [("image[]", (name, drawing.getvalue())) for name in ("a.png", "b.png")]
    fields = {"prompt": "make it green", "size": "512x512", "response_format": "b64_json"}
    answer = client.post("/v1/images/edits", files=sources, data=fields)
    assert answer.status_code == 200, answer.text


def test_a_body_may_have_the_servers_largest_size(client: httpx.Client) -> None:
    largest = Limits().max_body_bytes
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    seen = client.post("/v1/images/edits", content=bytes(largest), headers=headers)
    assert (seen.status_code, seen.json()["error"]["type"]) == (400, "invalid_request_error"), seen.text
    assert client.post("/v1/images/edits", content=bytes(largest + 1), headers=headers).status_code == 413


def test_work_stops_when_the_client_hangs_up(client: httpx.Client) -> None:
    def units() -> list[Any]:
        found: list[Any] = client.get("/v1/internal/status").json()["units"]
        return found

    with client.stream("POST", "/v1/images/generations", json=SLOW | {"stream": True}) as answer:
        assert answer.status_code == 200
        until(lambda: bool(units()))
    began = time.monotonic()
    until(lambda: not units())
    assert time.monotonic() - began < 5


@needs_jq
@pytest.mark.parametrize("program", ["openai/stream.sh", "jobs/job.sh"])
def test_the_examples_work_through_the_proxy(proxy: Endpoint, program: str, tmp_path: Path) -> None:
    environment = {"SERVER": proxy.url, "KEY": proxy.key, "CURL_CA_BUNDLE": str(proxy.certificate)}
    run = subprocess.run(
        ["bash", EXAMPLES / program],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("*.webp" if "stream" in program else "*.png"))


def test_http_2_is_offered(proxy: Endpoint) -> None:
    trust = ssl.create_default_context(cafile=proxy.certificate)
    trust.set_alpn_protocols(["h2", "http/1.1"])
    host, port = proxy.address
    with (
        socket.create_connection(("127.0.0.1", port)) as connection,
        trust.wrap_socket(connection, server_hostname=host) as encrypted,
    ):
        assert encrypted.selected_alpn_protocol() == "h2"


@pytest.mark.parametrize("kind", MARKED)
def test_the_timeout_is_longer_than_the_longest_request(kind: str, tmp_path: Path) -> None:
    text = (EXAMPLES / kind).read_text()
    timeout = re.compile(r"((?:proxy_read_timeout|response_header_timeout) )(\d+)s")
    assert [int(seconds) > Limits().deadline_s for _, seconds in timeout.findall(text)] == [True]
    # It is the one that counts: with a second, a silent request of two ends too early.
    with (
        proxied(tmp_path, kind, lambda text: timeout.sub(r"\g<1>1s", text)) as proxy,
        proxy.client(authorization=f"Bearer {proxy.key}") as client,
    ):
        body = {"prompt": "a boat", "size": "1024x1024", "num_inference_steps": 60}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 504
