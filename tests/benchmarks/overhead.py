"""Measures the time that the server adds to the two engines: HTTP, Ray, parsing, PNG file and URL.

Runs pairs of the same request on a server on this machine and on the engines in this process. Both end with
the encoded PNG. `make benchmark` runs this, or:

    python -m tests.benchmarks.overhead [--pairs 31]
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import torch
import yaml

from deployments.config import ModelConfig
from deployments.families.glm_image.decoder import Decoder
from deployments.families.glm_image.prior import PriorEngine
from deployments.stages.calls import Call
from deployments.types import ImageRequest
from serve_app.generation.codec import encode
from serve_app.generation.request import Encoding
from tests.serve.conftest import served

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
REQUEST = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "seed": 1}


def direct() -> Callable[[], None]:
    """Returns a function that runs the engines of `CONFIG` in this process, with its number of threads."""
    model = ModelConfig.model_validate(
        yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]["models"][0]
    )
    assert model.prior.cpu_threads
    torch.set_num_threads(model.prior.cpu_threads)
    prior, decoder, call = PriorEngine.load(model), Decoder.load(model), Call()
    threading.Thread(target=prior.run, daemon=True).start()

    def generate() -> None:
        asked = ImageRequest(prompt="a boat", width=512, height=512, seed=1)
        tokens = prior.submit(asked, call).result()
        request = ImageRequest(
            prompt="a boat", width=512, height=512, seed=1, steps=2, guidance_scale=1.5, prior=tokens
        )
        encode(decoder.decode(request, call), Encoding())

    return generate


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=31)
    pairs = parser.parse_args().pairs
    engines = direct()
    with served(CONFIG) as running, httpx.Client(timeout=60) as client:

        def ask() -> None:
            client.post(f"{running.url}/v1/images/generations", json=REQUEST).raise_for_status()

        for warm_up in (engines, ask, engines, ask):
            warm_up()
        times = [(seconds(engines), seconds(ask)) for _ in range(pairs)]
    added = sorted(1000 * (ours - alone) for alone, ours in times)
    print(f"512x512, 2 steps, tiny checkpoint, {pairs} pairs; milliseconds")
    print(f"engines alone, median  {1000 * statistics.median(alone for alone, _ in times):7.1f}")
    print(f"whole path, median     {1000 * statistics.median(ours for _, ours in times):7.1f}")
    low, high = added[pairs // 10], added[-1 - pairs // 10]
    print(f"added, median          {statistics.median(added):7.1f}   (10 %: {low:.1f}, 90 %: {high:.1f})")


if __name__ == "__main__":
    main()
