"""Two ingress replicas on a real server: limits and unloads concern both."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from serve_app.cluster.fleet import LEASE_S
from tests.faults.conftest import Client
from tests.polling import until
from tests.serve.conftest import config_file, served, tiny_model

pytestmark = pytest.mark.slow
MAX_PENDING, BEYOND = 8, 4


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, postgresql: Callable[[], str]) -> Iterator[Client]:
    config = config_file(
        tmp_path_factory.mktemp("fleet"),
        [tiny_model("m")],
        limits={"max_pending": MAX_PENDING, "max_images": 2},
        database={"url": postgresql()},
        ingress={"deployment": {"num_replicas": 2}},
    )
    with served(config) as running, Client(running) as client:
        until(lambda: len(running.replicas(":Ingress")) == 2)
        yield client


@pytest.fixture
def answers(client: Client) -> Iterator[list[Future[httpx.Response]]]:
    """Long requests: as many as the limit allows, and some more. The former are aborted at the end."""
    ask = partial(client.ask, size="1536x1536", num_inference_steps=100)
    with ThreadPoolExecutor(MAX_PENDING + BEYOND) as pool:
        yield [pool.submit(ask, seed=seed) for seed in range(MAX_PENDING + BEYOND)]
        until(lambda: client.get("/v1/internal/unload?force=true").status_code == 200, 30)


def codes(answers: list[Future[httpx.Response]]) -> list[int]:
    """Returns the status codes of the requests that have ended with an answer."""
    return sorted(one.result().status_code for one in answers if one.done() and not one.exception())


def test_the_limit_and_an_unload_concern_both_replicas(
    client: Client, answers: list[Future[httpx.Response]]
) -> None:
    until(lambda: codes(answers) == [429] * BEYOND, 30)
    refusal = client.get("/v1/internal/unload")
    assert refusal.status_code == 409
    assert refusal.json()["error"]["message"].startswith(f"{MAX_PENDING} generations are running.")
    assert client.get("/v1/internal/unload?force=true").status_code == 200
    until(lambda: codes(answers) == [429] * BEYOND + [503] * MAX_PENDING)
    unloaded = [one.result() for one in answers if one.result().status_code == 503]
    assert {one.json()["error"]["code"] for one in unloaded} == {"unloaded"}


def test_a_killed_replica_gives_its_share_back(client: Client, answers: list[Future[httpx.Response]]) -> None:
    until(lambda: codes(answers) == [429] * BEYOND, 30)
    assert not is_accepted(client)
    killed = client.running.replicas(":Ingress")[0]
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    until(lambda: sum(one.done() for one in answers) > BEYOND)
    until(lambda: is_accepted(client), LEASE_S + 5)


def is_accepted(client: Client) -> bool:
    """Returns whether the server accepts a further request, for which it has no time."""
    try:
        answer = client.ask(timeout=httpx.Timeout(10, read=1))
    except httpx.ReadTimeout:
        return True
    assert answer.status_code == 429, answer.text
    return False
