"""Clients that hang up: the stages' own counts show that the work stopped, and only that work.

Where a stage is to be caught in the midst of something its process is held by a signal.
"""

import http.client
import io
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from tests.serve.conftest import Upstream, config_file, served, tiny_model, until

pytestmark = pytest.mark.soak
STEPS = 4
SETTLED_S = 2 * RENEWAL_S + 1
"""A replica reports every `RENEWAL_S`, and the ingress reads that no older than a second."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hanging-up")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    model = tiny_model("m", prior={"max_batch_size": 2, "min_replicas": 1}, decoder={"min_replicas": 1})
    with served(config_file(folder, [model])) as running, Client(running) as client:
        assert client.ask().status_code == 200
        yield client


@pytest.fixture(scope="module")
def reference() -> Upstream:
    return Upstream(tiny.cached())


class Neighbour:
    """A client that stays."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor, seed: int) -> None:
        self._client = client
        self._seed = seed
        self._answer: Future[httpx.Response] = pool.submit(
            client.ask, seed=seed, num_inference_steps=STEPS, request_id=f"neighbour-{seed}"
        )
        until(lambda: unit(client, f"neighbour-{seed}") is not None)

    def tokens(self, reference: Upstream) -> int:
        """How many were drawn for it; its image is what it would be alone."""
        answer = self._answer.result()
        assert answer.status_code == 200, answer.text
        expected = reference("a boat", 512, 512, seed=self._seed, steps=STEPS)
        assert np.array_equal(self._client.pixels(answer), expected)
        return int(answer.json()["usage"]["output_tokens"])


@contextmanager
def asked(client: Client, *, sources: int = 0, **fields: Any) -> Iterator[http.client.HTTPConnection]:
    """A request, by the name of `leaver`, whose answer nobody waits for; `close` hangs up."""
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
    connection.request("POST", path, request.read(), headers)
    yield connection
    connection.close()


def unit(client: Client, request_id: str) -> dict[str, Any] | None:
    units: list[dict[str, Any]] = client.status()["units"]
    return next((one for one in units if one["request_id"] == request_id), None)


def is_at(client: Client, request_id: str, stage: str, least: int = 0) -> bool:
    found = unit(client, request_id)
    return found is not None and found["stage"] == stage and found.get("done", 0) >= least


def hang_up(client: Client, connection: http.client.HTTPConnection) -> None:
    connection.close()
    until(lambda: unit(client, "leaver") is None)


@contextmanager
def held(client: Client, process: str) -> Iterator[None]:
    (found,) = client.running.replicas(process)
    found.suspend()
    try:
        yield
    finally:
        found.resume()


def counts(client: Client) -> np.ndarray[Any, Any]:
    """Tokens drawn and steps made, by the stages' own counts, as soon as these stand still."""
    last, since = None, time.monotonic()

    def stand_still() -> bool:
        nonlocal last, since
        stages = client.stages("m")
        now = [stages["prior"]["done"], stages["decoder"]["done"]]
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > SETTLED_S

    until(stand_still)
    assert client.status()["units"] == []
    return np.array(last)


@pytest.mark.parametrize(
    ("request_", "stage", "least", "spare"),
    [
        # Reading the sources and the prompt, before the first token.
        ({"sources": 4}, "prior", 0, 0),
        # Between two tokens; progress is told four times a second.
        ({"size": "2048x2048"}, "prior", 1, 400),
        # Within a step: that one is the last one, and the one before it may not have been told.
        ({"size": "1024x1024", "num_inference_steps": 50}, "decoder", 2, 2),
    ],
)
def test_work_that_runs_stops_within_a_token_or_a_step(
    client: Client, reference: Upstream, request_: dict[str, Any], stage: str, least: int, spare: int
) -> None:
    before = counts(client)
    with asked(client, **request_) as leaver, ThreadPoolExecutor(1) as pool:
        until(partial(is_at, client, "leaver", stage, least))
        neighbour = Neighbour(client, pool, seed=11)
        with held(client, f"m-{stage}"):
            found = unit(client, "leaver")
            assert found is not None
            hang_up(client, leaver)
        kept = neighbour.tokens(reference)
    tokens, steps = counts(client) - before - (kept, STEPS)
    done, least_left = {"prior": (tokens, 800), "decoder": (steps, 40)}[stage]
    assert found["done"] <= done <= found["done"] + spare
    assert found["total"] - done >= least_left, "it was nearly done: this shows nothing"
    if stage == "prior":
        assert steps == 0


@pytest.mark.parametrize(
    ("stage", "long"), [("prior", {"size": "2048x2048"}), ("decoder", {"num_inference_steps": 100})]
)
def test_work_that_waits_for_a_stage_is_not_done(
    client: Client, reference: Upstream, stage: str, long: dict[str, Any]
) -> None:
    """It is not even begun, but when the call and its cancelling are there at once.

    Ray may then see the cancelling first, and tries again two seconds later (its `cancellation_retry_ms`).
    """
    before = counts(client)
    with ThreadPoolExecutor(2) as pool:
        neighbours = [Neighbour(client, pool, seed=seed) for seed in (12, 13)]
        until(partial(is_at, client, "neighbour-13", stage))  # so that the leaver comes behind both
        with held(client, f"m-{stage}"), asked(client, **long) as leaver:
            if stage == "decoder":
                until(partial(is_at, client, "leaver", "prior"))
            until(partial(is_at, client, "leaver", "waiting"))
            hang_up(client, leaver)
        kept = sum(neighbour.tokens(reference) for neighbour in neighbours)
    tokens, steps = counts(client) - before - (kept, 2 * STEPS)
    if stage == "prior":
        assert tokens < 64 * 64 + 16 * 16
        assert steps == 0
    else:
        assert tokens == 512
        assert steps < 100


def test_a_client_that_leaves_while_its_file_is_written_harms_nobody(
    client: Client, reference: Upstream, folder: Path
) -> None:
    before = counts(client)
    files = set((folder / "files").iterdir())
    with asked(client, size="2048x2048", num_inference_steps=1, response_format="url") as leaver:
        deadline = time.monotonic() + 60
        while set((folder / "files").iterdir()) == files:  # without a pause: it takes some milliseconds
            assert time.monotonic() < deadline
        with held(client, "Ingress"):
            leaver.close()
    with ThreadPoolExecutor(1) as pool:
        kept = Neighbour(client, pool, seed=14).tokens(reference)
    assert list(counts(client) - before - (kept, STEPS)) == [64 * 64 + 16 * 16, 1]
