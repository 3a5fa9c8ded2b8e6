"""Measures the time that metrics and traces add to a generation, in the ingress and in both stages.

Runs the server's own code in one replica. The engines answer immediately. There are no HTTP and Ray calls,
whose noise would exceed the measured times. Requests alternate between no telemetry, metrics only, and
metrics with traces. `make benchmark` runs this, or:

    python -m tests.benchmarks.telemetry [--rounds 500]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy as np
import ray
from ray import serve

from deployments.observability import metrics, tracing
from deployments.stages.models import DecoderStage, PriorStage
from deployments.types import Pixels
from serve_app.config import AppConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound
from tests.benchmarks.edge import BODY, TOKENS
from tests.serve.conftest import tiny_model
from tests.spans import Collector

PIXELS: Pixels = np.zeros((512, 512, 3), dtype=np.uint8)


@contextmanager
def mute() -> Iterator[None]:
    """Disables metrics and traces within the block."""
    with ExitStack() as stack:
        for kind, method in (
            (metrics.Counter, "add"),
            (metrics.Gauge, "set"),
            (metrics.Histogram, "observe"),
        ):
            stack.enter_context(mock.patch.object(kind, method))
        for name, nothing in (
            ("span", lambda *_, **__: nullcontext()),
            ("note", lambda *_, **__: None),
            ("record", lambda *_, **__: None),
            ("traceparent", lambda: ""),
        ):
            stack.enter_context(mock.patch.object(tracing, name, nothing))
        yield


@contextmanager
def counting() -> Iterator[None]:
    """Disables traces within the block."""
    with mock.patch.object(tracing, "_provider", None):
        yield


class Prior(PriorStage):
    """A prior stage that answers immediately."""

    def _load(self, _: Any) -> Any:
        def submit(*_: Any) -> Future[Any]:
            answer: Future[Any] = Future()
            answer.set_result(TOKENS)
            return answer

        return SimpleNamespace(fault=None, done=0, counts="tokens", submit=submit)


class Decoder(DecoderStage):
    """A decoder stage that answers immediately."""

    def _load(self, _: Any) -> Any:
        return SimpleNamespace(fault=None, done=0, counts="steps", decode=lambda *_: PIXELS)


class Bench:
    """The replica that runs all requests."""

    async def run(self, config: AppConfig, rounds: int) -> list[list[float]]:
        """Returns the milliseconds of each kind of request, for each round."""
        (model,) = config.models
        stages: dict[Any, Any] = {cls: cls.__new__(cls) for cls in (Prior, Decoder)}
        for stage in stages.values():
            await stage.__init__(model)  # as Serve does
        served = Model(
            config=model,
            prior=lambda request: stages[Prior].generate(request, ()),
            decode=lambda request: stages[Decoder].decode(request, ()),
        )
        files, outbound = FileStore(config.storage), Outbound(config.outbound)
        sources = SourceReader(outbound, files, config.limits)
        generator = Generator({model.name: served}, config.limits, sources)
        database = Database(config.database.url)
        lifecycle: Any = None  # not used by these requests
        app = create_app(Services.of(config, generator, lifecycle, files, database, outbound))
        times: list[list[float]] = []
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            for _ in range(rounds + 10):
                times.append([])
                for kind in (mute, counting, nullcontext):
                    with kind():
                        began = time.perf_counter()
                        answer = await client.post("/v1/images/generations", json=BODY)
                        times[-1].append(1000 * (time.perf_counter() - began))
                        answer.raise_for_status()
        tracing.stop()
        return times[10:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    collector = Collector()
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        collector.receiving(),
    ):
        os.environ |= {"RAY_TMPDIR": folder, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        config = AppConfig.model_validate(
            {
                "models": [tiny_model("m")],
                "auth": {"open": True},
                "storage": {"url": f"{folder}/files"},
                "database": {"url": f"sqlite:///{folder}/jobs.db"},
            }
        )
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        options: Any = {"ray_actor_options": {"num_cpus": 0}, "logging_config": {"encoding": "JSON"}}
        bench = serve.run(serve.deployment(**options)(Bench).bind())
        times = bench.run.remote(config, rounds).result()
        serve.shutdown()
        ray.shutdown()
    print(f"512x512, {rounds} rounds, {len(collector.spans)} spans came; milliseconds")
    print(f"without        median {statistics.median(without for without, *_ in times):6.2f}")
    for index, what in ((1, "metrics"), (2, "traces too")):
        added = sorted(row[index] - row[0] for row in times)
        low, high = added[rounds // 10], added[-1 - rounds // 10]
        median = statistics.median(added)
        print(f"{what:10} add median {median:6.2f}   (10 %: {low:.2f}, 90 %: {high:.2f})")


if __name__ == "__main__":
    main()
