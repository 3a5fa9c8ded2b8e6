"""Metrics of a run, scraped from Ray's endpoint. All documented metrics exist and have the right values."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.metrics import LOADS, UNLOADS, WORK, Histogram, Metric
from serve_app.observability import metrics
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import Running, config_file, served, tiny_model

pytestmark = pytest.mark.slow
STEPS = 3
BODY: dict[str, Any] = {"prompt": "a boat", "size": "512x512", "num_inference_steps": STEPS, "seed": 1}
MEGAPIXELS = 512 * 512 / 1e6
TOKENS = 512
"""Number of tokens generated for a 512x512 image, including those of the smaller image before it."""


@dataclass(frozen=True)
class Measured:
    """A server after the run, and the receiver of its webhooks."""

    running: Running
    receiver: Receiver

    def scrape(self) -> list[Any]:
        (line,) = [line for line in self.running.log if line.startswith("Metrics for Prometheus: ")]
        text = httpx.get(line.split()[-1], timeout=30).raise_for_status().text
        return list(text_string_to_metric_families(text))

    def value(self, metric: Metric, **labels: str) -> float:
        """Returns the sum of all series with these labels. For a histogram, it counts the observations."""
        name = metric.exported_as + ("_count" if isinstance(metric, Histogram) else "")
        return sum(
            float(sample.value)
            for family in self.scrape()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for(self, value: float, metric: Metric, **labels: str) -> None:
        """Waits until the metric has this value, because Ray exports metrics with a delay."""
        with suppress(AssertionError):
            until(lambda: self.value(metric, **labels) == pytest.approx(value), 30)
        assert self.value(metric, **labels) == pytest.approx(value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    receiver, folder = Receiver(), tmp_path_factory.mktemp("measured")
    models = [
        tiny_model("m", prior={"min_replicas": 1}, decoder={"min_replicas": 1}),
        tiny_model("broken", checkpoint=str(folder / "nowhere")),
    ]
    config = config_file(folder, models, outbound={"allow": [receiver.place]})
    with (
        receiver.receiving(),
        # Ray keeps a gauge for two of these intervals. That must be longer than the server's own interval.
        served(config, RAY_metrics_report_interval_ms="3000") as running,
        httpx.Client(base_url=running.url, timeout=120) as client,
    ):
        until(lambda: any(line.startswith("Metrics for") for line in running.log))
        run(client, running, receiver)
        yield Measured(running, receiver)


def run(client: httpx.Client, running: Running, receiver: Receiver) -> None:
    """Sends a request for two images, a job, and a request whose decoder is killed. Other requests fail."""
    path = "/v1/images/generations"
    assert client.post(path, json=BODY | {"n": 2}).status_code == 200
    job = client.post("/v1/images/jobs", json=BODY | {"webhook_url": f"{receiver.url}/hook"})
    until(lambda: client.get(job.headers["location"]).json().get("webhook", {}).get("state") == "delivered")
    with ThreadPoolExecutor() as pool:
        (decoder,) = running.replicas("m-decoder")
        waiting = pool.submit(client.post, path, json=BODY | {"num_inference_steps": 100})
        until(lambda: any(unit["stage"] == "decoder" for unit in units(client)))
        decoder.send_signal(signal.SIGKILL)
        assert waiting.result().status_code == 200
    assert client.post(path, json=BODY | {"size": "7x7"}).status_code == 400
    assert client.post(path, json=BODY | {"model": "broken"}).status_code == 500
    with suppress(httpx.ReadTimeout):
        client.post(path, json=BODY | {"size": "2048x2048"}, timeout=httpx.Timeout(10, read=1))
    until(lambda: not units(client))
    assert client.post("/v1/internal/unload").status_code == 200


def units(client: httpx.Client) -> list[Any]:
    found: list[Any] = client.get("/v1/internal/status").json()["units"]
    return found


def test_every_documented_metric_is_exported(measured: Measured) -> None:
    def missing() -> set[str]:
        found = {sample.name for family in measured.scrape() for sample in family.samples}
        wanted = {
            metric.exported_as + ("_count" if isinstance(metric, Histogram) else "")
            for metric in metrics.ALL
            if metric is not metrics.BACKGROUND_FAILURES  # no background task failed
        }
        return wanted - found - {"ray_image_server_memory_bytes", "ray_image_server_running"}

    with suppress(AssertionError):
        until(lambda: not missing(), 30)
    assert missing() == set()


def test_requests_and_images_are_counted_by_outcome(measured: Measured) -> None:
    route = {"api": "openai", "route": "/v1/images/generations"}
    measured.wait_for(2, metrics.REQUESTS, **route, model="m", outcome="succeeded")
    measured.wait_for(1, metrics.REQUESTS, **route, outcome="refused")
    measured.wait_for(1, metrics.REQUESTS, **route, model="broken", outcome="failed")
    measured.wait_for(1, metrics.REQUESTS, **route, outcome="cancelled")
    measured.wait_for(1, metrics.ERRORS, code="model_loading_failed")
    measured.wait_for(2, metrics.REQUEST_SECONDS, api="openai", outcome="succeeded")
    measured.wait_for(3, metrics.IMAGES, api="openai", model="m", outcome="made")
    measured.wait_for(1, metrics.IMAGES, api="images", model="m", outcome="made")
    measured.wait_for(1, metrics.IMAGES, model="broken", outcome="failed")
    measured.wait_for(1, metrics.IMAGES, model="m", outcome="cancelled")
    measured.wait_for(4 * MEGAPIXELS, metrics.MEGAPIXELS)


def test_the_duration_of_each_part_of_an_image_is_recorded(measured: Measured) -> None:
    for part in ("waiting", "prior", "decoder", "encoding", "storing"):
        measured.wait_for(4, metrics.PART_SECONDS, model="m", part=part)
        assert 0 < measured.value(metrics.WORKING_SECONDS, model="m", part=part) < 120


def test_jobs_webhooks_and_files_are_counted(measured: Measured) -> None:
    measured.wait_for(1, metrics.JOBS_ENDED, api="images", model="m", state="succeeded")
    measured.wait_for(1, metrics.WEBHOOKS, outcome="delivered")
    measured.wait_for(0, metrics.PENDING)
    measured.wait_for(0, metrics.JOBS)
    until(lambda: measured.value(metrics.FILES_BYTES) > 0, 90)


def test_the_stages_count_their_work_and_loads(measured: Measured) -> None:
    measured.wait_for(1, metrics.RETRIES, model="m", stage="decoder")
    loads = {stage: measured.value(LOADS, deployment=f"m-{stage}") for stage in ("prior", "decoder")}
    assert loads == {"prior": 1, "decoder": 2}
    assert measured.value(LOADS, deployment="broken-prior", outcome="failed") >= 1
    assert measured.value(UNLOADS, deployment="m-prior") == 1
    assert measured.value(WORK, deployment="m-decoder", unit="steps") >= 100
    assert measured.value(WORK, deployment="m-prior", unit="tokens") >= 4 * TOKENS
