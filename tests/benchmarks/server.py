"""Compares this server's default configuration with common alternatives, over HTTP, one after the other.

    python -m tests.benchmarks.server [--requests 48]

`make benchmark` runs this. The baselines are in `tests/benchmarks/baselines.py`: a plain FastAPI process
around `GlmImagePipeline` with a lock, and LitServe with dynamic batching. 512x512, 4 steps.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from deployments.families.glm_image import tiny
from tests.serve.conftest import config_file, served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
MAX_CONCURRENCY = 8
MODEL = "glm-image"
PROMPT = "A red boat at dawn"
CHECKPOINTS = {
    "narrow and deep": tiny.BENCHMARK,
    "wide and shallow": tiny.Sizes(
        codebook=2048,
        prior_width=768,
        prior_layers=3,
        prior_heads=6,
        decoder_heads=3,
        decoder_head_channels=128,
        decoder_layers=4,
        seed=1,
    ),
}
"""Checkpoints of random weights, each of about 40 million parameters."""


@dataclass(frozen=True)
class Result:
    """Figures of a server: seconds of a request, images per minute, seconds to the first of eight images."""

    one: float
    images_per_min: float
    first_of_eight: float
    seeds_kept: bool


@contextmanager
def baseline(kind: str, folder: Path) -> Iterator[Callable[[int], str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.benchmarks.baselines", kind, str(folder), str(port)]
    url = f"http://127.0.0.1:{port}/generate"
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True) as process,
        httpx.Client(timeout=None) as client,  # noqa: S113 - a benchmark waits as long as it takes
    ):

        def ask(seed: int) -> str:
            answer = client.post(url, json={"prompt": PROMPT, "seed": seed})
            answer.raise_for_status()
            image: str = answer.json()["image"]
            return image

        try:
            for _ in range(600):
                try:
                    ask(0)
                    break
                except httpx.TransportError:
                    assert process.poll() is None, "the baseline has ended"
                    time.sleep(0.2)
            yield ask
        finally:
            os.killpg(process.pid, 9)


@contextmanager
def ours(folder: Path) -> Iterator[Callable[[int], str]]:
    """Serves with the default configuration for CPUs."""
    stage = {"device": "cpu", "dtype": "float32"}
    model = {
        "name": MODEL,
        "family": "glm_image",
        "checkpoint": str(folder),
        "prior": stage,
        "decoder": stage,
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(config_file(Path(scratch), [model])) as running,
        httpx.Client(timeout=None) as client,  # noqa: S113
    ):

        def ask(seed: int) -> str:
            body = {"prompt": PROMPT, "seed": seed, "size": "512x512", "num_inference_steps": 4}
            answer = client.post(
                f"{running.url}/v1/images/generations", json=body | {"response_format": "b64_json"}
            )
            answer.raise_for_status()
            image: str = answer.json()["data"][0]["b64_json"]
            return image

        yield ask


def measure(ask: Callable[[int], str], requests: int) -> Result:
    ask(0)
    times, alone = [], {}
    for seed in range(3):
        began = time.perf_counter()
        alone[seed] = ask(seed)
        times.append(time.perf_counter() - began)
    with ThreadPoolExecutor(MAX_CONCURRENCY) as clients:
        began = time.perf_counter()
        ends: list[float] = []

        def timed(seed: int) -> str:
            image = ask(seed)
            ends.append(time.perf_counter() - began)
            return image

        together = list(clients.map(timed, range(MAX_CONCURRENCY)))
        first = min(ends)
        began = time.perf_counter()
        list(clients.map(ask, range(requests)))
        rate = 60 * requests / (time.perf_counter() - began)
    return Result(
        one=statistics.median(times),
        images_per_min=rate,
        first_of_eight=first,
        seeds_kept=all(together[seed] == image for seed, image in alone.items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    options = parser.parse_args()
    print(f"512x512, 4 steps, {options.requests} requests, {MAX_CONCURRENCY} at a time")
    for name, sizes in CHECKPOINTS.items():
        compare(name, tiny.cached(sizes), options.requests)


def compare(name: str, folder: Path, requests: int) -> None:
    """Prints the figures of all servers with a checkpoint."""
    with ours(folder) as ask:
        here = measure(ask, requests)
    with baseline("batched", folder) as ask:
        batched = measure(ask, requests)
    with baseline("plain", folder) as ask:
        plain = measure(ask, min(requests, 8))  # it serves one at a time; more add no information
    print(f"{name:26} {'one, s':>8} {'images/min':>11} {'first of 8, s':>14}  same bytes together")
    for server, result in (("plain FastAPI", plain), ("LitServe, batched", batched), ("here", here)):
        kept = "yes" if result.seeds_kept else "no"
        cells = f"{result.one:8.2f} {result.images_per_min:11.1f} {result.first_of_eight:14.2f}"
        print(f"{server:26} {cells}  {kept}")
    for server, other in (("plain FastAPI", plain), ("LitServe", batched)):
        print(
            f"here over {server}: one request {here.one / other.one:.2f}, images/min "
            f"{here.images_per_min / other.images_per_min:.2f}, "
            f"first of 8 {here.first_of_eight / other.first_of_eight:.2f}"
        )


if __name__ == "__main__":
    main()
