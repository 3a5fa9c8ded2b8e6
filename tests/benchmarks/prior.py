"""Compares the prior engine with upstream's `generate` in one run, with the same weights.

    python -m tests.benchmarks.prior [--runs 5] [--threads 2]

`make benchmark` runs this. The checkpoint is made by
`glm-image-server checkpoint tiny glm_image FOLDER --preset benchmark`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import GlmImagePipeline
from PIL import Image

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.families.glm_image import checkpoint, tiny
from deployments.families.glm_image.prior import PriorEngine
from deployments.stages.calls import Call
from deployments.types import ImageRequest
from tests.upstream import mended

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from deployments.types import PriorTokens

ROWS = 8
SOURCE = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)


def request(seed: int, width: int = 512, height: int = 512, *, edit: bool = False) -> ImageRequest:
    sources = (SOURCE,) if edit else ()
    return ImageRequest(prompt="A red boat at dawn", width=width, height=height, seed=seed, sources=sources)


MIXED = [
    request(0),
    request(1, 640, 512),
    request(2, edit=True),
    request(3, 512, 640),
    request(4),
    request(5, 608, 608),
    request(6, edit=True),
    request(7, 576, 512),
]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Upstream:
    def __init__(self, model: ModelConfig) -> None:
        weights, processor = checkpoint.load_prior(model)
        self._pipeline = mended(GlmImagePipeline(None, processor, None, weights, None, None, None))

    def __call__(self, *requests: ImageRequest) -> None:
        """Runs one request, or a batch of requests of one size, which upstream pads."""
        first = requests[0]
        self._pipeline.generate_prior_tokens(
            [one.prompt for one in requests],
            first.height,
            first.width,
            image=[[Image.fromarray(source) for source in one.sources] for one in requests]
            if first.sources
            else None,
            generator=torch.Generator().manual_seed(first.seed),
        )


class Ours:
    """Our engine, run by this thread like upstream. A second thread with OpenMP would slow down both."""

    def __init__(self, model: ModelConfig) -> None:
        self._engine = PriorEngine.load(model)

    def __call__(self, *requests: ImageRequest) -> None:
        self.arriving(list(requests), every_s=0)

    def arriving(self, requests: list[ImageRequest], every_s: float) -> tuple[float, float]:
        """Submits requests at an interval. Returns the seconds until the first and the last have ended."""
        began = time.perf_counter()
        futures: list[Future[PriorTokens]] = []
        first = 0.0
        while len(futures) < len(requests) or not all(future.done() for future in futures):
            while len(futures) < len(requests) and time.perf_counter() - began >= len(futures) * every_s:
                futures.append(self._engine.submit(requests[len(futures)], Call()))
            if not self._engine.step():
                self._engine.wait(0.001)  # the requests are being prepared, in another thread
            if not first and futures[0].done():
                first = time.perf_counter() - began
        return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stage = PriorConfig(device="cpu", dtype="float32", max_batch_size=ROWS, max_sequence_length=4096)
    checkpoint_folder = str(tiny.cached(tiny.BENCHMARK))
    model = ModelConfig(
        name="benchmark",
        family="glm_image",
        checkpoint=checkpoint_folder,
        prior=stage,
        decoder=DecoderConfig(device="cpu", dtype="float32"),
    )
    upstream, ours = Upstream(model), Ours(model)
    upstream(request(0))
    ours(request(0))

    # Runs alternate, so that changes of the machine's speed affect both.
    alone, padded, mixed_alone = [], [], []
    together: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    arrivals = []
    for run in range(options.runs):
        alone.append(seconds(lambda run=run: upstream(request(run))))  # type: ignore[misc]
        padded.append(seconds(lambda: upstream(*[request(i) for i in range(8)])))
        mixed_alone.append(sum(seconds(lambda one=one: upstream(one)) for one in MIXED))  # type: ignore[misc]
        for count, times in together.items():
            times.append(seconds(lambda count=count: ours(*[request(i) for i in range(count)])))  # type: ignore[misc]
        arrivals.append(ours.arriving(MIXED, every_s=0.5))

    tokens = 16 * 16 + 16 * 16
    one = statistics.median(alone)
    print(f"512x512, {options.threads} threads, medians of {options.runs} runs")
    print(f"{'':34} {'seconds':>8} {'tokens/s':>9} {'images/min':>11} {'over upstream':>14}")

    def row(name: str, images: int, time_s: float) -> None:
        rate = images / time_s
        print(f"{name:34} {time_s:8.2f} {rate * tokens:9.0f} {60 * rate:11.1f} {rate * one:14.2f}")

    row("upstream, one", 1, one)
    row("upstream, padded batch of 8", 8, statistics.median(padded))
    for count, times in together.items():
        row(f"here, {count} at once", count, statistics.median(times))
    firsts, totals = zip(*arrivals, strict=True)
    mixed = statistics.median(mixed_alone)
    every = statistics.median(totals)
    print("8 of mixed sizes, 2 of them edits, one every 0.5 s:")
    print(f"  all after {every:.2f} s, upstream one after the other {mixed:.2f} s, ratio {mixed / every:.2f}")
    print(f"  the first one after {statistics.median(firsts) / one:.2f} times upstream's own")


if __name__ == "__main__":
    main()
