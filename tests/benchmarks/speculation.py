"""Compares drawing several tokens in a pass with drawing one by one, in one run, with the same weights.

    python -m tests.benchmarks.speculation [--runs 5]

`make benchmark` runs this. The tokens must be the same; otherwise it fails. The benchmark checkpoint has all
CPUs, as by default, and the demo one thread, as in `configs/demo.yaml`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.cpus import cpu_limit
from deployments.families.glm_image import tiny
from deployments.families.glm_image.prior import PriorEngine
from deployments.families.glm_image.speculation import RequestTokens
from deployments.stages.calls import Call
from deployments.types import ImageRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.config import Speculation
    from deployments.types import Pixels, PriorTokens

ROWS = 8
THREADS = {"benchmark": cpu_limit(), "demo": 1}
PROMPT = "a red circle on a blue background"
EDIT = "make the circle green"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that are made at the same time.

    Attributes:
        checkpoint: `demo`, or `benchmark` for random weights.
        count: number of requests.
        side: side of the images in pixels.
        edits: whether each request has a source image.
    """

    checkpoint: str
    count: int
    side: int = 512
    edits: bool = False

    @property
    def requests(self) -> list[ImageRequest]:
        """The requests, with the seeds 0, 1, …"""
        sources = (drawing(),) if self.edits else ()
        prompt = EDIT if self.edits else PROMPT
        return [
            ImageRequest(prompt=prompt, width=self.side, height=self.side, seed=seed, sources=sources)
            for seed in range(self.count)
        ]

    def __str__(self) -> str:
        kind = "edits" if self.edits else "images"
        return f"{self.checkpoint}, {self.count} {kind} of {self.side}x{self.side}"


LOADS = (
    *(Load(checkpoint="benchmark", count=count) for count in (1, 2, 4, 8)),
    *(Load(checkpoint="demo", count=count) for count in (1, 2, 4, 8)),
    Load(checkpoint="demo", count=1, side=1024),
    Load(checkpoint="demo", count=1, edits=True),
)


def drawing() -> Pixels:
    """Returns the picture that `PROMPT` describes: shape (512, 512, 3)."""
    picture = Image.new("RGB", (512, 512), "blue")
    ImageDraw.Draw(picture).ellipse((160, 160, 352, 352), "red")
    return np.asarray(picture)


class Engine:
    """A prior engine.

    Args:
        checkpoint: see `Load`.
        speculation: see `deployments.config.PriorConfig`.
    """

    def __init__(self, checkpoint: str, speculation: Speculation) -> None:
        folder = str(tiny.cached(tiny.BENCHMARK)) if checkpoint == "benchmark" else checkpoint
        model = ModelConfig(
            name=checkpoint,
            family="glm_image",
            checkpoint=folder,
            prior=PriorConfig(
                device="cpu",
                dtype="float32",
                max_batch_size=ROWS,
                max_sequence_length=4096,
                speculation=speculation,
            ),
            decoder=DecoderConfig(device="cpu", dtype="float32"),
        )
        self._engine = PriorEngine.load(model)

    def run(self, requests: Sequence[ImageRequest]) -> tuple[list[PriorTokens], float]:
        """Returns the priors, and the seconds until the last one."""
        began = time.perf_counter()
        futures = [self._engine.submit(request, Call()) for request in requests]
        while not all(future.done() for future in futures):
            if not self._engine.step():
                self._engine.wait(0.001)  # the requests are being prepared, in another thread
        return [future.result() for future in futures], time.perf_counter() - began


@dataclass
class Acceptance:
    """Tokens settled by passes, by the place in the grid of the first token that a pass draws."""

    settled: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, engine: Engine, requests: Sequence[ImageRequest]) -> None:
        """Notes what each pass settles while the requests are made."""
        settle = RequestTokens.settle

        def noted(drawing: RequestTokens, drawn: list[int]) -> None:
            before = len(drawing.settled)
            settle(drawing, drawn)
            if before:
                self.settled[_place(drawing, before)].append(len(drawing.settled) - before)

        with mock.patch.object(RequestTokens, "settle", noted):
            engine.run(requests)


def _place(drawing: RequestTokens, index: int) -> str:
    """Returns where a token is in its grid."""
    for rows, columns in drawing.sequence.grids:
        if index < rows * columns:
            return "first row" if index < columns else "other rows"
        index -= rows * columns
    raise ValueError("there is no such token")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="alternating pairs of runs")
    options = parser.parse_args()
    engines = {}
    for name, threads in THREADS.items():
        torch.set_num_threads(threads)
        engines[name] = Engine(name, "off"), Engine(name, "auto")
    print(f"threads: {THREADS}; medians of {options.runs} alternating pairs")
    print(f"| {'':38} | one by one, s | here, s | times as fast | tokens of a request in a pass |")
    print("|---|---:|---:|---:|---:|")
    for load in LOADS:
        torch.set_num_threads(THREADS[load.checkpoint])
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.runs + 1):  # the first pair is a warm-up
            priors = []
            for engine, times in zip(engines[load.checkpoint], taken, strict=True):
                made, seconds = engine.run(load.requests)
                priors.append(made)
                times.append(seconds)
            for one, other in zip(*priors, strict=True):
                assert np.array_equal(one.target, other.target), "speculation changed a token"
        plain, here = (statistics.median(times[1:]) for times in taken)
        passes = sum(prior.passes for prior in made)
        settled = sum(prior.generated_tokens for prior in made) / passes
        print(f"| {load!s:38} | {plain:.2f} | {here:.2f} | {plain / here:.2f} | {settled:.1f} |")
    acceptance = Acceptance()
    acceptance.watch(engines["demo"][1], Load(checkpoint="demo", count=1, side=1024).requests)
    for place, counts in acceptance.settled.items():
        print(f"demo, 1024x1024, passes that begin in the {place}: {statistics.mean(counts):.1f} tokens each")


if __name__ == "__main__":
    main()
