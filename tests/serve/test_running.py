"""The running server: its output, health during generation, disconnects, startup checks and OpenAPI."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from serve_app import __version__
from serve_app.cli.serve import closed, is_local
from serve_app.config import AppConfig
from tests.http.test_bad_input import GROUPS, rejected
from tests.polling import until
from tests.serve.conftest import ROOT, Server, config_file, served, tiny_model

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1, "seed": 3}
LONG = {"prompt": "a boat", "size": "1024x1024", "num_inference_steps": 100}
"""Fields of a request that takes the tiny model about a minute."""


def test_the_printed_command_generates_an_image(server: Server) -> None:
    line = re.search(r"^  (curl .*)$", server.printed, re.MULTILINE)
    assert line
    assert server.url in line[1]
    answer = subprocess.run([*shlex.split(line[1]), "-sS"], check=True, capture_output=True)
    (image,) = json.loads(answer.stdout)["data"]
    assert httpx.get(image["url"]).content.startswith(b"\x89PNG")


def test_health_responds_during_generation(client: httpx.Client, server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        work = [
            pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=SMALL | {"n": 4}, timeout=60)
        ]
        answers = []
        while not work[0].done():
            answers.append(client.get("/health", timeout=5))
        answers.append(client.get("/health", timeout=5))
        assert work[0].result().status_code == 200
    assert len(answers) > 1
    seen: dict[str, set[str]] = {"prior": set(), "decoder": set()}
    for answer in answers:
        assert answer.status_code == 200
        health = answer.json()
        busy = health["models"].pop("glm-image")
        for stage in health["models"]["other"].values():
            assert stage.pop("done") >= 0
        assert health == {
            "status": "ok",
            "version": __version__,
            "model_loaded": True,
            "models": {"other": {stage: {"state": "ready", "replicas": 1} for stage in seen}},
        }
        for stage, status in busy.items():
            assert status["replicas"] == 1
            seen[stage].add(status["state"])
    assert seen == {"prior": {"ready", "generating"}, "decoder": {"ready", "generating"}}


def test_a_disconnect_aborts_the_request(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/images/generations", json=LONG, timeout=3)
    assert client.post("/v1/images/generations", json=SMALL, timeout=10).status_code == 200


@pytest.mark.parametrize("group", GROUPS)
def test_bad_input_does_not_grow_the_ingress(client: httpx.Client, server: Server, group: str) -> None:
    (ingress,) = server.running.replicas("Ingress")
    before = ingress.memory_info().rss
    for number, (request, status, param) in enumerate(GROUPS[group]):
        rejected(client, request, status, param, f"case {number}")
    assert client.post("/v1/images/generations", json=SMALL).status_code == 200
    assert ingress.memory_info().rss < 1.5 * before


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104
def test_a_public_host_requires_keys(host: str) -> None:
    run = subprocess.run(
        ["make", "-s", "serve", f"HOST={host}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "auth.open is ignored, and there are no auth.api_keys; make one with" in run.stderr


def test_a_public_host_in_the_configuration_requires_keys(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"  # noqa: S104 - the server does not start
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["make", "-s", "serve", f"CONFIG={tmp_path}/config.yaml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "there are no auth.api_keys" in run.stderr
    assert not is_local("")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ssl_certfile": "a.pem"}, "give both ssl_certfile and ssl_keyfile"),
        ({"ssl_certfile": "nowhere.pem", "ssl_keyfile": "nowhere.pem"}, "No such file"),
        ({"ssl_certfile": "Makefile", "ssl_keyfile": "Makefile"}, "PEM"),
    ],
)
def test_an_invalid_certificate_is_rejected(tmp_path: Path, options: dict[str, str], problem: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["http_options"] |= options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["make", "-s", "serve", f"CONFIG={tmp_path}/config.yaml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert problem in run.stderr


def test_a_public_host_with_keys_ignores_auth_open() -> None:
    args = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())["applications"][0]["args"]
    args["auth"]["api_keys"] = [{"id": "a", "sha256": "0" * 64}]
    config = AppConfig.model_validate(args)
    assert config.auth.open
    assert not closed(config).auth.open
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_local(host)


def test_every_openapi_reference_resolves(client: httpx.Client) -> None:
    document = client.get("/openapi.json")
    references = set(re.findall(r'"\$ref":"([^"]*)"', document.text))
    assert len(references) > 10
    for reference in references:
        target = document.json()
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_openapi_describes_the_request_bodies(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    generation = paths["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    edit = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert paths["/v1/images/generations"]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "text/event-stream",
    }
    assert generation["schema"]["required"] == ["prompt"]
    assert edit["schema"]["required"] == ["prompt", "image"]


def test_the_terminal_shows_the_start_and_the_images_in_a_few_lines(
    server: Server, client: httpx.Client
) -> None:
    start, metrics, _ = server.printed.partition("Metrics for Prometheus: ")
    assert metrics
    assert len(start.splitlines()) < 8
    before = len(server.running.log)
    assert client.post("/v1/images/generations", json=SMALL).status_code == 200
    until(lambda: len(server.running.log) > before)
    assert re.search(r"glm-image: 512x512, 1 steps, [0-9.]+ s$", "".join(server.running.log[before:]).strip())


def test_a_configuration_that_needs_absent_gpus_is_rejected_before_ray_starts() -> None:
    command = [sys.executable, "-m", "serve_app", "serve", "configs/two-gpus.yaml"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert run.returncode == 2
    assert "asks for 2 GPUs, and there are 0" in run.stderr


def test_an_interrupt_of_make_alone_stops_the_server(tmp_path: Path) -> None:
    with served(config_file(tmp_path, [tiny_model("glm-image")])) as running:
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)
    assert "Stopped.\n" in running.log
