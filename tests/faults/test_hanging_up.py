"""Clients that disconnect. The stages' counts show that their work stops, and only their work.

Some tests suspend the process of a stage with a signal, to disconnect at a certain moment.
"""

import http.client
import io
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.families.glm_image import tiny
from deployments.scaling import RENEWAL_S
from tests.faults.conftest import SMALL, Client
from tests.polling import until
from tests.serve.conftest import Upstream, config_file, served, tiny_model

pytestmark = pytest.mark.soak
STEPS = 4
SETTLED_S = 2 * RENEWAL_S + 1
"""Seconds without a change after which counts are final.

A replica reports every `RENEWAL_S`, and the ingress caches a report for at most a second.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hanging-up")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    # Tokens are drawn one by one, so that the prior stage takes long enough to leave it.
    prior = {"max_batch_size": 2, "min_replicas": 1, "speculation": "off"}
    model = tiny_model("m", prior=prior, decoder={"min_replicas": 1})
    with served(config_file(folder, [model])) as running, Client(running) as client:
        assert client.ask().status_code == 200
        yield client


@pytest.fixture(scope="module")
def reference() -> Upstream:
    return Upstream(tiny.cached())


class Neighbour:
    """A request whose client stays connected."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor, seed: int, steps: int = STEPS) -> None:
        self._client = client
        self._seed = seed
        self._steps = steps
        self._answer: Future[httpx.Response] = pool.submit(
            client.ask, seed=seed, num_inference_steps=steps, request_id=f"neighbour-{seed}"
        )
        until(lambda: unit(client, f"neighbour-{seed}") is not None)

    def tokens(self, reference: Upstream) -> int:
        """Returns the number of its generated tokens. Checks that its image is unaffected."""
        answer = self._answer.result()
        assert answer.status_code == 200, answer.text
        expected = reference("a boat", 512, 512, seed=self._seed, steps=self._steps)
        assert np.array_equal(self._client.pixels(answer), expected)
        return int(answer.json()["usage"]["output_tokens"])


@contextmanager
def open_request(client: Client, *, sources: int = 0, **fields: Any) -> Iterator[http.client.HTTPConnection]:
    """Sends a request with the ID `leaver`, and yields its connection. `close` disconnects."""
    address = httpx.URL(client.running.url)
    if sources:
        file = io.BytesIO()
        Image.effect_noise((2048, 2048), 80).save(file, "PNG", compress_level=1)
        files = [("image[]", ("f", file.getvalue()))] * sources
        request = httpx.Request("POST", address, data={"prompt": "a boat"} | fields, files=files)
        path = "/v1/images/edits"
    else:
        request = httpx.Request("POST", address, json=SMALL | fields)
        path = "/v1/images/generations"
    connection = http.client.HTTPConnection(address.host, address.port or 80, timeout=60)
    headers = {"Content-Type": request.headers["Content-Type"], "X-Request-ID": "leaver"}
    with closing(connection):
        connection.request("POST", path, request.read(), headers)
        yield connection


def unit(client: Client, request_id: str) -> dict[str, Any] | None:
    units: list[dict[str, Any]] = client.status()["units"]
    return next((one for one in units if one["request_id"] == request_id), None)


def is_at(client: Client, request_id: str, stage: str, min_done: int = 0) -> bool:
    found = unit(client, request_id)
    return found is not None and found["stage"] == stage and found.get("done", 0) >= min_done


def disconnect(client: Client, connection: http.client.HTTPConnection) -> None:
    connection.close()
    until(lambda: unit(client, "leaver") is None)


@contextmanager
def suspended(client: Client, process: str) -> Iterator[None]:
    (found,) = client.running.replicas(process)
    found.suspend()
    try:
        yield
    finally:
        found.resume()


def counts(client: Client) -> np.ndarray[Any, Any]:
    """Returns the stages' counts of tokens and steps, once these no longer change."""
    last, since = None, time.monotonic()

    def is_stable() -> bool:
        nonlocal last, since
        stages = client.stages("m")
        now = [stages["prior"]["done"], stages["decoder"]["done"]]
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > SETTLED_S

    until(is_stable)
    assert client.status()["units"] == []
    return np.array(last)


@pytest.mark.parametrize(
    ("request_", "stage", "min_done", "tolerance"),
    [
        # In the prefill of the source images and the prompt, before the first token.
        ({"sources": 4}, "prior", 0, 0),
        # Between two tokens. Progress is reported four times a second.
        ({"size": "2048x2048"}, "prior", 1, 400),
        # Within a step. That step is the last one, and the step before it may be unreported.
        ({"size": "1024x1024", "num_inference_steps": 50}, "decoder", 2, 2),
    ],
)
def test_a_disconnect_stops_running_work(
    client: Client, reference: Upstream, request_: dict[str, Any], stage: str, min_done: int, tolerance: int
) -> None:
    before = counts(client)
    with open_request(client, **request_) as connection, ThreadPoolExecutor(1) as pool:
        until(partial(is_at, client, "leaver", stage, min_done))
        neighbour = Neighbour(client, pool, seed=11)
        with suspended(client, f"m-{stage}"):
            found = unit(client, "leaver")
            assert found is not None
            disconnect(client, connection)
        neighbour_tokens = neighbour.tokens(reference)
    tokens, steps = counts(client) - before - (neighbour_tokens, STEPS)
    done, min_left = {"prior": (tokens, 800), "decoder": (steps, 40)}[stage]
    assert found["done"] <= done <= found["done"] + tolerance
    assert found["total"] - done >= min_left, "the request was nearly finished, so this test is inconclusive"
    if stage == "prior":
        assert steps == 0


@pytest.mark.parametrize(("stage", "steps"), [("prior", STEPS), ("decoder", 60)])
def test_queued_work_of_a_disconnected_client_never_starts(
    client: Client, reference: Upstream, stage: str, steps: int
) -> None:
    """No process is suspended here: Ray may lose a cancellation that a resumed process gets with its call."""
    before = counts(client)
    with ThreadPoolExecutor(2) as pool:
        neighbours = [Neighbour(client, pool, seed=seed, steps=steps) for seed in (12, 13)]
        # The other request queues behind both: this prior has two places and this decoder one.
        until(lambda: all(is_at(client, f"neighbour-{seed}", "prior") for seed in (12, 13)))
        with open_request(client) as connection:
            if stage == "decoder":
                until(partial(is_at, client, "leaver", "prior"))
            until(partial(is_at, client, "leaver", "waiting"))
            disconnect(client, connection)
        assert unit(client, "neighbour-13") is not None, "nothing held the request up: inconclusive"
        neighbour_tokens = sum(neighbour.tokens(reference) for neighbour in neighbours)
    leaver_tokens = neighbour_tokens // 2 if stage == "decoder" else 0
    assert list(counts(client) - before - (neighbour_tokens, 2 * steps)) == [leaver_tokens, 0]


def test_a_disconnect_during_a_file_write_affects_no_other_request(
    client: Client, reference: Upstream, folder: Path
) -> None:
    before = counts(client)
    files = set((folder / "files").iterdir())
    with open_request(client, size="2048x2048", num_inference_steps=1, response_format="url") as connection:
        # Until then the test leaves both cores to the prior. The file is written within milliseconds.
        until(partial(is_at, client, "leaver", "decoder"))
        deadline = time.monotonic() + 180
        while set((folder / "files").iterdir()) == files:
            assert time.monotonic() < deadline
        with suspended(client, "Ingress"):
            connection.close()
    with ThreadPoolExecutor(1) as pool:
        neighbour_tokens = Neighbour(client, pool, seed=14).tokens(reference)
    assert list(counts(client) - before - (neighbour_tokens, STEPS)) == [64 * 64 + 16 * 16, 1]
