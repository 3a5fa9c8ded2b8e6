"""Measures the time that the edge adds to a generation: key, parsing, admission, file and log.

Sends pairs of requests to two ingresses on one Ray: the server's, and a bare one. The bare one calls the same
stages and encodes the same PNG. The stages answer immediately. `make benchmark` runs this, or:

    python -m tests.benchmarks.edge [--pairs 200]
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import ray
from fastapi import FastAPI
from ray import serve

from deployments.types import ImageRequest, Pixels, PriorTokens
from serve_app.app import Ingress
from serve_app.config import AppConfig
from serve_app.generation.codec import encode
from serve_app.generation.request import Encoding
from tests.serve.conftest import tiny_model

KEY = "the-key"
PORT = 18_741
BODY = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "seed": 1}
TOKENS = PriorTokens(target=np.zeros((16, 16), dtype=np.int64))
PIXELS: Pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)


class Stage:
    """A prior and decoder stage without a model."""

    async def generate(self, _: ImageRequest, sources: tuple[Pixels, ...]) -> AsyncIterator[PriorTokens]:
        yield TOKENS

    async def decode(self, _: ImageRequest, sources: tuple[Pixels, ...]) -> AsyncIterator[Pixels]:
        yield PIXELS


bare_app = FastAPI()


@serve.ingress(bare_app)
class Bare:
    """A minimal ingress between HTTP and the stages."""

    def __init__(self, prior: Any, decoder: Any) -> None:
        self._prior = prior.options(stream=True)
        self._decoder = decoder.options(stream=True)

    @bare_app.post("/")
    async def generate(self) -> dict[str, int]:
        asked = ImageRequest(prompt="a boat", width=512, height=512, seed=1)
        async for tokens in self._prior.generate.remote(asked, ()):
            request = ImageRequest(
                prompt="a boat", width=512, height=512, seed=1, steps=2, guidance_scale=1.5, prior=tokens
            )
        async for pixels in self._decoder.decode.remote(request, ()):
            size = len(encode(pixels, Encoding()))
        return {"size": size}


def milliseconds(call: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    call().raise_for_status()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    pairs = parser.parse_args().pairs
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 100}

    def stages() -> dict[str, Any]:
        return {name: serve.deployment(name=name, **options)(Stage).bind() for name in ("prior", "decoder")}

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        config = AppConfig.model_validate(
            {
                "models": [tiny_model("m")],
                "auth": {"api_keys": [{"id": "k", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]},
                "storage": {"url": f"{folder}/files"},
                "database": {"url": f"sqlite:///{folder}/jobs.db"},
            }
        )
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        whole = serve.deployment(**options)(serve.ingress()(Ingress))
        serve.run(whole.bind(config, {"m": stages()}), name="whole", route_prefix="/whole")
        serve.run(serve.deployment(**options)(Bare).bind(**stages()), name="bare", route_prefix="/bare")
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=60) as client:

            def ask_whole() -> httpx.Response:
                return client.post("/whole/v1/images/generations", json=BODY)

            def ask_bare() -> httpx.Response:
                return client.post("/bare/")

            for _ in range(10):
                ask_whole(), ask_bare()
            times = [(milliseconds(ask_bare), milliseconds(ask_whole)) for _ in range(pairs)]
        serve.shutdown()
        ray.shutdown()
    added = sorted(whole - bare for bare, whole in times)
    print(f"512x512, {pairs} pairs; milliseconds")
    print(f"bare ingress, median   {statistics.median(bare for bare, _ in times):6.1f}")
    print(f"the server's, median   {statistics.median(whole for _, whole in times):6.1f}")
    low, high = added[pairs // 10], added[-1 - pairs // 10]
    print(f"added, median          {statistics.median(added):6.1f}   (10 %: {low:.1f}, 90 %: {high:.1f})")


if __name__ == "__main__":
    main()
