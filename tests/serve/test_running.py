"""The running server: what it prints, how it answers while it works, and that work nobody waits for stops."""

import json
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.conftest import Server

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1, "seed": 3}
LONG = {"prompt": "a boat", "size": "1024x1024", "num_inference_steps": 100}
"""About a minute of work for the tiny model."""


def test_the_printed_line_makes_an_image(server: Server) -> None:
    line = re.search(r"^  (curl .*)$", server.printed, re.MULTILINE)
    assert line
    assert server.url in line[1]
    answer = subprocess.run([*shlex.split(line[1]), "-sS"], check=True, capture_output=True)
    (image,) = json.loads(answer.stdout)["data"]
    assert httpx.get(image["url"]).content.startswith(b"\x89PNG")


def test_health_answers_while_images_are_made(client: httpx.Client, server: Server) -> None:
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
        assert health == {
            "status": "ok",
            "model_loaded": True,
            "models": {"other": {stage: {"state": "ready", "replicas": 1} for stage in seen}},
        }
        for stage, status in busy.items():
            assert status["replicas"] == 1
            seen[stage].add(status["state"])
    assert seen == {"prior": {"ready", "generating"}, "decoder": {"ready", "generating"}}


def test_work_that_nobody_waits_for_is_stopped(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/images/generations", json=LONG, timeout=3)
    assert client.post("/v1/images/generations", json=SMALL, timeout=10).status_code == 200


def test_openapi_describes_the_bodies(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    generation = paths["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    edit = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert paths["/v1/images/generations"]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "text/event-stream",
    }
    assert generation["schema"]["required"] == ["prompt"]
    assert edit["schema"]["required"] == ["prompt", "image"]
