"""Overload, clients that disconnect and killed replicas, on a real server."""

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deployments.families.glm_image import tiny
from tests.faults.conftest import Client
from tests.pictures import picture
from tests.polling import until
from tests.serve.conftest import Upstream, config_file, served, tiny_model

pytestmark = pytest.mark.slow
MAX_PENDING, BEYOND = 20, 30


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    config = config_file(
        tmp_path_factory.mktemp("faults"),
        [tiny_model("fragile")],
        limits={"max_pending": MAX_PENDING},
    )
    with served(config) as running, Client(running) as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> Upstream:
    return Upstream(tiny.cached())


def replica(client: Client, stage: str) -> psutil.Process:
    (found,) = client.running.replicas(f"fragile-{stage}")
    return found


def test_requests_beyond_max_pending_are_rejected_immediately(client: Client) -> None:
    """All requests arrive while the stages load, so none finishes and makes room for another."""
    assert client.get("/v1/internal/unload").status_code == 200
    with ThreadPoolExecutor(MAX_PENDING + BEYOND) as pool:
        answers = list(pool.map(lambda seed: client.ask(seed=seed), range(MAX_PENDING + BEYOND)))
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in rejected] == [200] * MAX_PENDING
    assert len(rejected) == BEYOND
    for answer in rejected:
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["code"] == "busy"
        assert answer.elapsed.total_seconds() < 5
    assert client.status() == {"status": "idle", "queue_length": 0, "jobs_queued": 0, "units": []}
    assert client.ask(seed=1).status_code == 200


def test_the_status_reports_the_progress_of_each_image(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, n=2, num_inference_steps=6, size="1024x1024")
        seen: list[Any] = []

        def is_in_decoder() -> bool:
            seen.append(client.status())
            return any(unit["stage"] == "decoder" for unit in seen[-1]["units"])

        until(is_in_decoder)
        assert answer.result().status_code == 200
    assert seen[-1]["status"] == "generating"
    in_decoder = next(unit for unit in seen[-1]["units"] if unit["stage"] == "decoder")
    assert in_decoder.keys() == {"request_id", "model", "stage", "done", "total", "seconds"}
    assert (in_decoder["model"], in_decoder["total"]) == ("fragile", 6)


def test_the_status_contains_the_clients_request_id(client: Client) -> None:
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(client.ask, seed=seed) for seed in range(11)]
        until(lambda: len(client.status()["units"]) == 11)
        mine = pool.submit(client.ask, request_id="mine")
        ahead: list[int] = []

        def is_in_decoder() -> bool:
            (unit,) = (unit for unit in client.status()["units"] if unit["request_id"] == "mine")
            if unit["stage"] == "waiting":
                ahead.append(unit["ahead"])
            return bool(unit["stage"] == "decoder")

        until(lambda: any(unit["request_id"] == "mine" for unit in client.status()["units"]))
        until(is_in_decoder)
        assert [answer.result().status_code for answer in (*others, mine)] == [200] * 12
        assert mine.result().headers["x-request-id"] == "mine"
    assert ahead == sorted(ahead, reverse=True)
    assert ahead[0] > 0


def disconnect(client: Client, after_s: float) -> None:
    """Sends a long request, and disconnects while it is queued, in the prior or in the decoder."""
    with pytest.raises(httpx.ReadTimeout):
        client.ask(size="1536x1536", num_inference_steps=100, timeout=httpx.Timeout(30, read=after_s))


def test_a_disconnect_aborts_only_the_clients_own_request(client: Client, reference: Upstream) -> None:
    seeds = range(200, 203)
    delays_s = np.random.default_rng(0).uniform(0.05, 12, 12)
    with ThreadPoolExecutor(len(delays_s) + len(seeds)) as pool:
        disconnecting = [pool.submit(disconnect, client, after_s) for after_s in delays_s]
        others = [pool.submit(client.ask, seed=seed, num_inference_steps=4) for seed in seeds]
        for one in disconnecting:
            one.result()
        for seed, answer in zip(seeds, others, strict=True):
            expected = reference("a boat", 512, 512, seed=seed, steps=4)
            assert np.array_equal(client.pixels(answer.result()), expected)
    until(lambda: not client.status()["units"])
    # The stages are free immediately. An abandoned unit would take more than a minute.
    assert client.ask(timeout=20).status_code == 200


def is_at(client: Client, stage: str) -> bool:
    return stage in client.working()


def test_requests_survive_killed_replicas(client: Client) -> None:
    seeds = range(1000, 1016)
    with ThreadPoolExecutor(len(seeds)) as pool:
        undisturbed = list(pool.map(lambda seed: client.pixels(client.ask(seed=seed)), seeds))
        answers = [pool.submit(client.ask, seed=seed) for seed in seeds]
        for stage in ("prior", "decoder"):
            until(partial(is_at, client, stage))
            os.kill(replica(client, stage).pid, signal.SIGKILL)
        for expected, answer in zip(undisturbed, answers, strict=True):
            assert answer.result().status_code == 200, answer.result().text
            assert np.array_equal(client.pixels(answer.result()), expected)


def test_a_second_killed_replica_fails_the_request(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, seed=7, size="2048x2048")
        for _ in range(2):
            until(lambda: client.working() == ["prior"])
            os.kill(replica(client, "prior").pid, signal.SIGKILL)
            until(lambda: client.working() != ["prior"])  # it waits for the next replica, or has failed
        result = answer.result()
    assert result.status_code == 500
    assert result.headers["x-should-retry"] == "false"
    assert result.json()["error"]["code"] == "replica_died"
    assert client.ask(seed=1).status_code == 200


def test_a_crash_of_a_codec_harms_no_other_request(client: Client) -> None:
    source = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    edit = {"images": [{"image_url": source}], "prompt": "a boat", "num_inference_steps": 1, "seed": 1}

    def edited() -> httpx.Response:
        return httpx.post(f"{client.running.url}/v1/images/edits", json=edit, timeout=120)

    first = edited()
    assert first.status_code == 200, first.text
    (ingress,) = client.running.replicas(":Ingress")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(client.ask, seed=8, num_inference_steps=20)
        until(lambda: bool(client.working()))
        (codec,) = client.running.replicas("serve_app.generation.decoding")
        codec.send_signal(signal.SIGSEGV)
        until(lambda: codec.status() == psutil.STATUS_ZOMBIE)
        assert edited().status_code == 200
        assert other.result().status_code == 200
    assert client.running.replicas(":Ingress") == [ingress]
