"""Authentication by key, in several headers. The server checks the key before it reads a body."""

import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from pydantic import TypeAdapter

from serve_app.config import APIKey
from serve_app.http import application
from serve_app.http.auth import presented_keys
from tests.http.conftest import Endpoint, served
from tests.polling import until

PUBLIC = {
    "/health",
    "/version",
    "/livez",
    "/readyz",
    "/openapi.json",
    "/openapi.yaml",
    "/.well-known/jwks.json",
    "/files/{name}",
    "/storage/upload/{stem}.upload",
}


@pytest.fixture
def http(guarded: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60) as http:
        yield http


def test_every_route_except_public_ones_requires_a_key(http: httpx.Client) -> None:
    paths: dict[str, Any] = http.get("/openapi.json").json()["paths"]
    routes = [(path, method) for path, operations in paths.items() for method in operations]
    assert len(routes) >= 11
    answers = [(path, http.request(method, path.replace("{name}", "x"))) for path, method in routes]
    for path, answer in answers:
        if path in PUBLIC:
            assert answer.status_code in (200, 404, 422), path
        else:
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
    assert http.get("/openapi.yaml").status_code == 200
    for page in ("/", "/docs"):  # they ask for the key themselves
        assert http.get(page).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1/../health",
        "/files/../v1/models",
        "/playground/../v1/models",
        "/docs/../v1/models",
        "/HEALTH",
        "//health",
    ],
)
def test_unlisted_paths_require_a_key(guarded: Endpoint, path: str) -> None:
    with closing(HTTPConnection(guarded.url.removeprefix("http://"), timeout=10)) as connection:
        connection.request("GET", path)  # httpx would normalize the path
        assert connection.getresponse().status == 401


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer {key}"},
        {"authorization": "bearer {key}"},
        {"Authorization": "Key {key}"},
        {"Ocp-Apim-Subscription-Key": "{key}"},
    ],
)
def test_a_key_is_accepted_in_each_supported_header(
    http: httpx.Client, guarded: Endpoint, header: dict[str, str]
) -> None:
    for key in (guarded.key, guarded.other_key):
        sent = {name: value.format(key=key) for name, value in header.items()}
        assert http.get("/v1/models", headers=sent).status_code == 200
    wrong = {name: value.format(key="wrong") for name, value in header.items()}
    answer = http.get("/v1/models", headers=wrong)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "{key}"},
        {"Authorization": "Basic {key}"},
        {"Authorization": "Bearer{key}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer {key} {key}"},
        {"Authorization": "Bearer {sha256}"},
        {"X-API-Key": "{key}"},
        {"Cookie": "key={key}"},
        {"Ocp-Apim-Subscription-Key": ""},
    ],
)
def test_a_key_in_an_unsupported_form_is_rejected(
    http: httpx.Client, guarded: Endpoint, header: dict[str, str]
) -> None:
    values = {"key": guarded.key, "sha256": hashlib.sha256(guarded.key.encode()).hexdigest()}
    sent = {name: value.format(**values) for name, value in header.items()}
    assert http.get("/v1/models", headers=sent).status_code == 401
    assert http.get("/v1/models", params={"key": guarded.key, "api_key": guarded.key}).status_code == 401


def test_a_missing_key_is_rejected_before_the_body_is_read(guarded: Endpoint) -> None:
    for headers in ("Content-Length: 10000000", "Transfer-Encoding: chunked"):
        with socket.create_connection(guarded.address, timeout=10) as connection:
            head = f"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
            connection.sendall(f"{head}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_long_headers_are_parsed_quickly() -> None:
    """A regular expression could take hours to match these headers."""
    for value in (b"Bearer" + b" " * 2**20, b"Bearer " + b"x " * 2**19, b" " * 2**20):
        assert len(presented_keys([(b"authorization", value)])) <= 1


def test_the_openai_client_raises_an_authentication_error(guarded: Endpoint) -> None:
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong") as sdk,
        pytest.raises(openai.AuthenticationError, match="The API key is not known here"),
    ):
        sdk.images.generate(prompt="a boat")


def test_a_command_creates_a_key() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "serve_app", "keys", "new", "alice"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.strip() for line in run.stdout.splitlines()]
    digests = [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    line = next(line for line in lines if line.startswith("- {id: alice, sha256: "))
    assert line.removeprefix("- {id: alice, sha256: ").removesuffix("}") in digests
    operators = subprocess.run(
        [sys.executable, "-m", "serve_app", "keys", "new", "olga", "--role", "operator"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert operators.stdout.rstrip().endswith(", role: operator}")
    (key,) = TypeAdapter(list[APIKey]).validate_python(yaml.safe_load(operators.stdout.splitlines()[-1]))
    assert (key.id, key.role) == ("olga", "operator")
    refused = subprocess.run(
        [sys.executable, "-m", "serve_app", "keys", "new", "a b"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "letters, digits" in refused.stderr


def test_keys_are_exchanged_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "RELOAD_S", 0.2)
    file = tmp_path / "keys.yaml"

    def allow(*keys: str) -> None:
        hashes = (hashlib.sha256(key.encode()).hexdigest() for key in keys)
        file.write_text("\n".join(f"- {{id: key-{at}, sha256: {one}}}" for at, one in enumerate(hashes)))

    allow("old")
    with served(tmp_path, "glm-image", auth={"keys_file": str(file)}) as server, server.client() as http:

        def statuses() -> list[int]:
            return [
                http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
                for key in ("old", "new")
            ]

        assert statuses() == [200, 401]
        allow("old", "new")
        until(lambda: statuses() == [200, 200])
        allow("new")
        until(lambda: statuses() == [401, 200])
