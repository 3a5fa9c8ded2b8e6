"""Failing helpers: a hanging safety checker, and a language model behind an OpenAI-compatible server.

That server is `transformers serve` with the tiny chat model.
"""

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deployments.families.glm_image import tiny
from deployments.helpers.chat_model import tiny as chat_model
from tests.faults.conftest import Client
from tests.polling import until
from tests.serve.conftest import Upstream, config_file, served, tiny_model
from tests.serve.test_helpers import expanded

pytestmark = pytest.mark.slow
TIMEOUT_S = 4.0
ON_CPU: dict[str, Any] = {
    "checkpoint": "tiny",
    "cpu_threads": 1,
    "min_replicas": 1,
}


@contextmanager
def language_model(port: int) -> Iterator[psutil.Process]:
    program = str(Path(sys.executable).with_name("transformers"))
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with psutil.Popen([program, "serve", str(chat_model.cached()), *options]) as process:
        try:
            until(lambda: is_healthy(port), 120)
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serving(folder: Path, **args: Any) -> Iterator[Client]:
    model = tiny_model("m", prior={"min_replicas": 1}, decoder={"min_replicas": 1})
    with served(config_file(folder, [model], **args)) as running, Client(running) as client:
        assert client.ask().status_code == 200
        yield client


def prompt_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["revised_prompt"])


def test_a_slow_or_missing_language_model_fails_no_request(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = {"base_url": f"http://127.0.0.1:{port}/v1", "model": str(chat_model.cached())}
    args: dict[str, Any] = {
        "prompt_expander": {"endpoint": endpoint, "max_tokens": 24, "timeout_s": TIMEOUT_S},
        "outbound": {"allow": [f"127.0.0.1:{port}"]},
    }
    fields: dict[str, Any] = {"enable_prompt_expansion": True, "seed": 3}
    with serving(tmp_path, **args) as client:
        reference = Upstream(tiny.cached())
        plain = reference("a boat", 512, 512, seed=3)
        answer = client.ask(**fields)
        assert prompt_of(answer) == "a boat", "no language model is running yet"
        assert np.array_equal(client.pixels(answer), plain)
        with language_model(port) as process:
            until(lambda: prompt_of(client.ask(**fields)) != "a boat")  # the first response may be slow
            answer = client.ask(**fields)
            assert prompt_of(answer) == expanded("a boat")
            assert np.array_equal(client.pixels(answer), reference(expanded("a boat"), 512, 512, seed=3))
            process.send_signal(signal.SIGSTOP)
            answer = client.ask(**fields)
            assert prompt_of(answer) == "a boat"
            assert np.array_equal(client.pixels(answer), plain)
        assert prompt_of(client.ask(**fields)) == "a boat"


@pytest.mark.parametrize("on_failure", [pytest.param("open", marks=pytest.mark.soak), "closed"])
def test_a_hanging_safety_checker_times_out(tmp_path: Path, on_failure: str) -> None:
    checker = {"classifier": ON_CPU, "threshold": 1, "on_failure": on_failure, "timeout_s": TIMEOUT_S}
    with serving(tmp_path, safety_checker=checker) as client:
        until(lambda: client.get("/health").json()["safety_checker"]["state"] == "ready")
        plain = client.pixels(client.ask(seed=3))
        (process,) = client.running.replicas("safety-checker")
        process.send_signal(signal.SIGSTOP)
        answer = client.ask(seed=3)
        process.send_signal(signal.SIGCONT)
        if on_failure == "open":
            assert np.array_equal(client.pixels(answer), plain)
        else:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "safety_check_failed"
            assert answer.headers["x-should-retry"] == "false"
        assert np.array_equal(client.pixels(client.ask(seed=3)), plain), (
            "the next request must use the checker again"
        )


def test_a_safety_checker_that_cannot_be_loaded_fails_open(tmp_path: Path) -> None:
    broken = {"classifier": ON_CPU | {"checkpoint": str(tmp_path / "nowhere")}}
    with serving(tmp_path, safety_checker=broken | {"on_failure": "open"}) as client:
        # The request in `serving` has already caused a retry of the load.
        until(lambda: client.get("/health").json()["safety_checker"]["state"] == "failed")
