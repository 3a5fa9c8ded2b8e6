"""Too many requests, requests that take too long, and replicas that die: on a real server of its own."""

import base64
import io
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from deployments.glm_image import tiny
from deployments.types import Pixels
from tests.serve.conftest import ROOT, Upstream, served, until

MODEL = "fragile"
MAX_PENDING = 12
DEADLINE_S = 60
SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "response_format": "b64_json"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("faults")
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    arguments = config["applications"][0]["args"]
    (model,) = arguments["models"]
    model["name"] = MODEL
    arguments["storage"] = {"url": str(folder / "files")}
    arguments["limits"] = {"max_pending": MAX_PENDING, "deadline_s": DEADLINE_S}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with served(folder / "config.yaml") as printed:
        match = re.search(r"Serving on (http://\S+)\. ", printed)
        assert match
        yield match[1]


@pytest.fixture(scope="module")
def reference() -> Upstream:
    return Upstream(tiny.cached())


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=SMALL | fields, timeout=120)


def pixels(answer: httpx.Response) -> Pixels:
    (image,) = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))


def status(url: str) -> Any:
    return httpx.get(f"{url}/v1/internal/status", timeout=5).json()


def stages(url: str) -> list[str]:
    return [unit["stage"] for unit in status(url)["units"]]


def replica(stage: str) -> psutil.Process:
    (found,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and f"{MODEL}-{stage}" in " ".join(process.cmdline())
    )
    return found


def test_beyond_the_bound_requests_are_refused_at_once_and_the_others_are_made(url: str) -> None:
    with ThreadPoolExecutor(MAX_PENDING + 8) as pool:
        answers = list(pool.map(lambda seed: ask(url, seed=seed), range(MAX_PENDING + 8)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in refused] == [200] * MAX_PENDING
    assert len(refused) == 8
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["code"] == "busy"
        assert answer.elapsed.total_seconds() < 5
    assert status(url) == {"status": "idle", "queue_length": 0, "units": []}
    assert ask(url, seed=1).status_code == 200


def test_the_status_tells_how_far_each_image_is(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, n=2, num_inference_steps=6, size="1024x1024")
        seen: list[Any] = []

        def is_painting() -> bool:
            seen.append(status(url))
            return any(unit["stage"] == "decoder" for unit in seen[-1]["units"])

        until(is_painting)
        assert answer.result().status_code == 200
    assert seen[-1]["status"] == "generating"
    painting = next(unit for unit in seen[-1]["units"] if unit["stage"] == "decoder")
    assert painting.keys() == {"model", "stage", "done", "total", "seconds"}
    assert (painting["model"], painting["total"]) == (MODEL, 6)


def hang_up(url: str, after_s: float) -> None:
    """Ask for something long, and leave: in the queue, in the prior, or at one of the decoder's steps."""
    fields = SMALL | {"size": "1536x1536", "num_inference_steps": 100}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json=fields, timeout=httpx.Timeout(30, read=after_s))


def test_clients_that_hang_up_stop_their_own_work_and_no_other(url: str, reference: Upstream) -> None:
    seeds = range(200, 203)
    moments = np.random.default_rng(0).uniform(0.05, 12, MAX_PENDING - len(seeds))
    with ThreadPoolExecutor(MAX_PENDING) as pool:
        leaving = [pool.submit(hang_up, url, after_s) for after_s in moments]
        staying = [pool.submit(ask, url, seed=seed, num_inference_steps=4) for seed in seeds]
        for client in leaving:
            client.result()
        for seed, answer in zip(seeds, staying, strict=True):
            assert np.array_equal(pixels(answer.result()), reference("a boat", 512, 512, seed=seed, steps=4))
    until(lambda: not stages(url))
    # The stages are free at once: one of the units that were left would take a minute and more.
    assert httpx.post(f"{url}/v1/images/generations", json=SMALL, timeout=20).status_code == 200


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_replica_that_dies_costs_time_and_nothing_else(url: str, reference: Upstream, stage: str) -> None:
    seeds = range(100, 106)
    with ThreadPoolExecutor(len(seeds)) as pool:
        answers = [pool.submit(ask, url, seed=seed, num_inference_steps=4) for seed in seeds]
        until(lambda: stage in stages(url))
        os.kill(replica(stage).pid, signal.SIGKILL)
        for seed, answer in zip(seeds, answers, strict=True):
            assert answer.result().status_code == 200
            assert np.array_equal(pixels(answer.result()), reference("a boat", 512, 512, seed=seed, steps=4))


def test_a_replica_that_dies_twice_is_an_error_that_is_not_worth_a_retry(url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, seed=7, size="2048x2048")
        for _ in range(2):
            until(lambda: stages(url) == ["prior"])
            os.kill(replica("prior").pid, signal.SIGKILL)
            until(lambda: stages(url) != ["prior"])  # waiting for the next replica, or given up
        result = answer.result()
    assert result.status_code == 500
    assert result.headers["x-should-retry"] == "false"
    assert result.json()["error"]["code"] == "replica_died"
    assert ask(url, seed=1).status_code == 200
