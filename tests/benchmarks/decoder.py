"""Compares the decoder with upstream's pipeline in one run, with the same prior tokens.

    python -m tests.benchmarks.decoder [--pairs 9] [--threads 2]

`make benchmark` runs this. The checkpoint is made by
`glm-image-server checkpoint tiny glm_image FOLDER --preset benchmark`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import GlmImagePipeline

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.errors import Cancelled
from deployments.families.glm_image import tiny
from deployments.families.glm_image.decoder import Decoder
from deployments.stages.calls import Call
from deployments.types import ImageRequest, PriorTokens, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.types import Event

TOKENS = PriorTokens(target=np.random.default_rng(0).integers(0, tiny.BENCHMARK.codebook, (16, 16)))
REQUEST = ImageRequest(
    prompt='A red boat called "Aurora" at dawn',
    width=512,
    height=512,
    seed=0,
    steps=10,
    guidance_scale=1.5,
    prior=TOKENS,
)
UNITS = 8


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def upstream(pipeline: GlmImagePipeline, request: ImageRequest) -> None:
    tokens = torch.from_numpy(TOKENS.target.repeat(2, 0).repeat(2, 1).reshape(1, -1))
    pipeline(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        prior_token_ids=tokens,
    )


class Busy:
    """Records the times at which the device works: from the start to the end of each model's pass."""

    def __init__(self, decoder: Decoder) -> None:
        self.spans: list[tuple[float, float]] = []
        pipeline = decoder.pipeline
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae.decoder):
            part.register_forward_pre_hook(lambda *_: self.spans.append((time.perf_counter(), 0)))
            part.register_forward_hook(lambda *_: self._end())

    def _end(self) -> None:
        self.spans[-1] = (self.spans[-1][0], time.perf_counter())


def idle_between(busy: Busy, decoder: Decoder, units: list[ImageRequest]) -> tuple[float, float]:
    """Runs units in a stage's thread. Returns the total seconds, and the idle seconds between units."""
    busy.spans.clear()
    ends: list[int] = []
    with ThreadPoolExecutor(1) as thread:

        def unit(request: ImageRequest) -> None:
            decoder.decode(request, Call())
            ends.append(len(busy.spans))

        for done in [thread.submit(unit, request) for request in units]:
            done.result()
    whole = busy.spans[-1][1] - busy.spans[0][0]
    return whole, sum(busy.spans[end][0] - busy.spans[end - 1][1] for end in ends[:-1])


def cancel(busy: Busy, decoder: Decoder) -> tuple[float, float]:
    """Cancels during a step. Returns the seconds until the device is idle, and the seconds of a step."""
    steps: list[float] = []
    cancelled_at = 0.0
    passes = 0

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            steps.append(event.seconds)

    call = Call(report=report)

    def after_pass(*_: object) -> None:
        nonlocal passes, cancelled_at
        passes += 1
        if passes == 7:  # the first of the fourth step's two
            call.cancelled.set()
            cancelled_at = time.perf_counter()

    hook = decoder.pipeline.transformer.register_forward_hook(after_pass)
    try:
        decoder.decode(REQUEST, call)
    except Cancelled:
        return busy.spans[-1][1] - cancelled_at, statistics.median(np.diff(steps))
    finally:
        hook.remove()
    raise AssertionError("the unit was not cancelled")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = tiny.cached(tiny.BENCHMARK)
    stage = DecoderConfig(device="cpu", dtype="float32")
    decoder = Decoder.load(
        ModelConfig(
            name="benchmark",
            family="glm_image",
            checkpoint=str(folder),
            prior=PriorConfig(device="cpu", dtype="float32"),
            decoder=stage,
        )
    )
    pipeline = GlmImagePipeline.from_pretrained(folder, vision_language_encoder=None, processor=None)
    pipeline.set_progress_bar_config(disable=True)
    requests = [replace(REQUEST, seed=i) for i in range(max(UNITS, options.pairs))]
    decoder.decode(REQUEST, Call())
    upstream(pipeline, REQUEST)

    pairs = [
        (
            seconds(lambda one=one: decoder.decode(one, Call())),  # type: ignore[misc]
            seconds(lambda one=one: upstream(pipeline, one)),  # type: ignore[misc]
            seconds(lambda one=one: decoder.decode(replace(one, previews=3), Call())),  # type: ignore[misc]
        )
        for one in requests[: options.pairs]
    ]
    ours, theirs, previews = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"512x512, {REQUEST.steps} steps, {options.threads} threads, {options.pairs} alternating pairs")
    print(f"  upstream {theirs:.3f} s, here {ours:.3f} s")
    ratio = statistics.median(mine / upstreams for mine, upstreams, _ in pairs)
    print(f"  here over upstream, median of the pairs: {ratio:.3f}")
    share = statistics.median((with_ - without) / without for without, _, with_ in pairs)
    print(f"  three previews add {100 * share:.1f} %, {1000 * (previews - ours) / 3:.0f} ms each")
    busy = Busy(decoder)
    whole, idle = idle_between(busy, decoder, requests[:UNITS])
    share = 100 * idle / whole
    print(f"{UNITS} units in a row: the device is idle between two of them {share:.2f} % of the time")
    until_idle, step = (
        statistics.median(x) for x in zip(*[cancel(busy, decoder) for _ in range(5)], strict=True)
    )
    print(f"cancelled in mid-step: idle after {until_idle / step:.2f} steps")


if __name__ == "__main__":
    main()
