"""Too many requests, clients that leave, and replicas that die: on a real server of its own."""

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
from tests.serve.conftest import Upstream, config_file, served, tiny_model, until

pytestmark = pytest.mark.slow
MAX_PENDING = 60


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


def test_beyond_the_bound_requests_are_refused_at_once_and_the_others_are_made(client: Client) -> None:
    """All of them come while the stages load, so that none makes room for another one."""
    assert client.get("/v1/internal/unload").status_code == 200
    with ThreadPoolExecutor(MAX_PENDING + 40) as pool:
        answers = list(pool.map(lambda seed: client.ask(seed=seed), range(MAX_PENDING + 40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in refused] == [200] * MAX_PENDING
    assert len(refused) == 40
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["code"] == "busy"
        assert answer.elapsed.total_seconds() < 5
    assert client.status() == {"status": "idle", "queue_length": 0, "jobs_queued": 0, "units": []}
    assert client.ask(seed=1).status_code == 200


def test_the_status_tells_how_far_each_image_is(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, n=2, num_inference_steps=6, size="1024x1024")
        seen: list[Any] = []

        def is_painting() -> bool:
            seen.append(client.status())
            return any(unit["stage"] == "decoder" for unit in seen[-1]["units"])

        until(is_painting)
        assert answer.result().status_code == 200
    assert seen[-1]["status"] == "generating"
    painting = next(unit for unit in seen[-1]["units"] if unit["stage"] == "decoder")
    assert painting.keys() == {"request_id", "model", "stage", "done", "total", "seconds"}
    assert (painting["model"], painting["total"]) == ("fragile", 6)


def test_the_status_tells_where_a_request_is_by_the_id_that_its_client_has_chosen(client: Client) -> None:
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(client.ask, seed=seed) for seed in range(11)]
        until(lambda: len(client.status()["units"]) == 11)
        mine = pool.submit(client.ask, request_id="mine")
        ahead: list[int] = []

        def is_made() -> bool:
            (unit,) = (unit for unit in client.status()["units"] if unit["request_id"] == "mine")
            if unit["stage"] == "waiting":
                ahead.append(unit["ahead"])
            return bool(unit["stage"] == "decoder")

        until(lambda: any(unit["request_id"] == "mine" for unit in client.status()["units"]))
        until(is_made)
        assert [answer.result().status_code for answer in (*others, mine)] == [200] * 12
        assert mine.result().headers["x-request-id"] == "mine"
    assert ahead == sorted(ahead, reverse=True)
    assert ahead[0] > 0


def hang_up(client: Client, after_s: float) -> None:
    """Ask for something long, and leave: in the queue, in the prior, or at one of the decoder's steps."""
    with pytest.raises(httpx.ReadTimeout):
        client.ask(size="1536x1536", num_inference_steps=100, timeout=httpx.Timeout(30, read=after_s))


def test_clients_that_hang_up_stop_their_own_work_and_no_other(client: Client, reference: Upstream) -> None:
    seeds = range(200, 203)
    moments = np.random.default_rng(0).uniform(0.05, 12, 12)
    with ThreadPoolExecutor(len(moments) + len(seeds)) as pool:
        leaving = [pool.submit(hang_up, client, after_s) for after_s in moments]
        staying = [pool.submit(client.ask, seed=seed, num_inference_steps=4) for seed in seeds]
        for one in leaving:
            one.result()
        for seed, answer in zip(seeds, staying, strict=True):
            expected = reference("a boat", 512, 512, seed=seed, steps=4)
            assert np.array_equal(client.pixels(answer.result()), expected)
    until(lambda: not client.status()["units"])
    # The stages are free at once: one of the units that were left would take a minute and more.
    assert client.ask(timeout=20).status_code == 200


def is_at(client: Client, stage: str) -> bool:
    return stage in client.working()


def test_replicas_that_die_cost_time_and_nothing_else(client: Client) -> None:
    seeds = range(1000, 1050)
    with ThreadPoolExecutor(len(seeds)) as pool:
        undisturbed = list(pool.map(lambda seed: client.pixels(client.ask(seed=seed)), seeds))
        answers = [pool.submit(client.ask, seed=seed) for seed in seeds]
        for stage in ("prior", "decoder"):
            until(partial(is_at, client, stage))
            os.kill(replica(client, stage).pid, signal.SIGKILL)
        for expected, answer in zip(undisturbed, answers, strict=True):
            assert answer.result().status_code == 200, answer.result().text
            assert np.array_equal(client.pixels(answer.result()), expected)


def test_a_replica_that_dies_twice_is_an_error_that_is_not_worth_a_retry(client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, seed=7, size="2048x2048")
        for _ in range(2):
            until(lambda: client.working() == ["prior"])
            os.kill(replica(client, "prior").pid, signal.SIGKILL)
            until(lambda: client.working() != ["prior"])  # waiting for the next replica, or given up
        result = answer.result()
    assert result.status_code == 500
    assert result.headers["x-should-retry"] == "false"
    assert result.json()["error"]["code"] == "replica_died"
    assert client.ask(seed=1).status_code == 200
