"""The prior stage at the released size: one and eight requests, prompts, passes of other shapes, kernels."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.config import gpu_window
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.stages.calls import Call
from tests.gpu import engines, measure, models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.config import Speculation
    from deployments.types import ImageRequest
    from tests.gpu.engines import Prior
    from tests.gpu.rows import Run

SOURCES = (0, 1, 4)
PASSES: tuple[tuple[int, Speculation], ...] = ((1, "off"), (1, 16), (8, "off"), (8, 16), (64, "off"))
"""Rows of a decoding pass, and the tokens of each. The step `prior` measures 8 rows with 8 tokens each."""
WRITTEN = 1024
"""Number of tokens that each row holds when a decoding pass is timed."""
WEIGHT_GB = 16.453
"""Gigabytes of weights that one decoding pass of the released model reads: layers and head."""


def prior(run: Run) -> None:
    """Writes the prior stage's figures."""
    device = measure.prepare(run)
    loaded = engines.load_prior(run, device)
    first_tokens(run, loaded)
    memory = measure.Memory(device)
    side = run.size(1024)
    requests = [engines.prior_request(side, seed=seed) for seed in range(engines.ROWS)]
    digests: dict[int, str] = {}
    for count, name in ((1, "alone"), (engines.ROWS, "eight together")):
        with run.figure(f"prior, {name}", side=side, requests=count) as values:
            # The first request comes last, so that it gets another row in company.
            made, seconds = engines.generate(loaded, requests[:count][::-1])
            answers = made[::-1]
            tokens = sum(answer.generated_tokens for answer in answers)
            values |= {
                "seconds": seconds,
                "tokens_s": tokens / seconds,
                "images_min": 60 * count / seconds,
                "ms_a_pass": 1e3 * seconds * count / sum(answer.passes for answer in answers),
                "tokens_a_pass": tokens / sum(answer.passes for answer in answers),
                "digest": measure.digest(answers[0].target),
            }
            digests[count] = values["digest"]
    with run.figure("prior, same tokens alone and together") as values:
        values["same"] = digests[1] == digests[engines.ROWS]
    run.emit("prior, memory", **memory.values())
    prompts(run, loaded, device)
    # On a CPU, the stage uses another engine. The GPU's engine is built to try its code.
    captured = loaded if run.on_gpu else engines.load_prior(run, device, as_on_gpu=True)
    decoding_pass(run, captured, device)
    without_graph(run, captured, requests, device)
    # Last, because the profiler slows down later figures.
    with run.figure("prior, a step of eight rows by kernel") as values, busy(captured, requests):
        values |= measure.kernels(captured.engine.step, device)


def passes(run: Run) -> None:
    """Writes the time of decoding passes of other shapes."""
    device = measure.prepare(run)
    for rows, speculation in PASSES:
        measure.free(device)
        window = gpu_window(speculation, rows)
        with run.figure("prior, a decoding pass of another shape", rows=rows, window=window) as values:
            model, _ = models.prior(device, tiny_size=run.tiny)
            length = run.count(2 * WRITTEN, 1024)
            language_model = GPULanguageModel(
                model, rows=rows, max_sequence_length=length, speculation=speculation
            )
            fill(language_model)
            with torch.inference_mode():
                values["ms"] = measure.milliseconds(language_model.run_decoding, device, runs=50)


def fill(language_model: GPULanguageModel) -> None:
    """Makes the next passes read `WRITTEN` tokens in each row, as if its prompt were so long."""
    states = language_model.row_tokens.states
    states[0] = 0
    states[1] = min(WRITTEN, language_model.max_sequence_length - 1)


def first_tokens(run: Run, loaded: Prior) -> None:
    """Writes the digest of one seed's tokens, for comparison with a process with an empty cache."""
    side = run.size(512)
    with run.figure("prior, tokens of seed 0", side=side) as values:
        (answer,), values["seconds"] = engines.generate(loaded, [engines.prior_request(side)])
        values["digest"] = measure.digest(answer.target)
        values["different_tokens"] = len(np.unique(answer.target))


@contextmanager
def busy(loaded: Prior, requests: Sequence[ImageRequest]) -> Iterator[None]:
    """Keeps the engine between two decoding steps of all requests, and cancels them afterwards."""
    call, engine = Call(), loaded.engine
    until = engine.work["tokens"] + 8 * len(requests)
    futures = [engine.submit(request, call) for request in requests]

    def are_done() -> bool:
        return all(future.done() for future in futures)

    engines.step_until(engine, lambda: engine.work["tokens"] >= until or are_done())
    try:
        yield
    finally:
        call.cancelled.set()
        engines.step_until(engine, are_done)


def decoding_pass(run: Run, loaded: Prior, device: torch.device) -> None:
    """Writes the time of the captured pass, without the host's work."""
    with run.figure("prior, the decoding pass", rows=engines.ROWS) as values, torch.inference_mode():
        fill(loaded.language_model)
        values["ms"] = ms = measure.milliseconds(loaded.language_model.run_decoding, device, runs=50)
        values["weights_tb_s"] = WEIGHT_GB / ms


def prompts(run: Run, loaded: Prior, device: torch.device) -> None:
    """Writes the time from a request to its first token, without and with source images."""
    side = run.size(1024)
    for sources in SOURCES:
        with run.figure("prior, first token after", sources=sources, source_side=side) as values:
            request = engines.prior_request(side, sources=sources, source_side=side)
            values["first_time_s"] = until_first_token(loaded, request, device)
            values["seconds"] = until_first_token(loaded, request, device)


def until_first_token(loaded: Prior, request: ImageRequest, device: torch.device) -> float:
    """Returns the seconds from a request to its first token, and cancels it."""
    engine, call = loaded.engine, Call()
    done, began = engine.work["tokens"], time.perf_counter()
    future = engine.submit(request, call)
    engines.step_until(engine, lambda: engine.work["tokens"] > done or future.done())
    measure.synchronize(device)
    seconds = time.perf_counter() - began
    call.cancelled.set()
    engines.step_until(engine, future.done)
    return seconds


def without_graph(run: Run, loaded: Prior, requests: Sequence[ImageRequest], device: torch.device) -> None:
    """Writes the time of a step with and without the CUDA graph, for eight requests."""
    language_model, steps = loaded.language_model, run.count(40, 5)

    def some_steps() -> None:
        for _ in range(steps):
            loaded.engine.step()

    for by in ("CUDA graph", "no graph"):
        with run.figure("prior, eight together, by steps", by=by) as values, busy(loaded, requests):
            captured, before = language_model.run_decoding, loaded.engine.work["tokens"]
            try:
                if by == "no graph":
                    language_model.run_decoding = language_model.decoding_pass
                _, seconds = measure.seconds(some_steps, device)
            finally:
                language_model.run_decoding = captured
            drawn = loaded.engine.work["tokens"] - before
            values["ms_a_pass"] = 1e3 * seconds / steps
            values["tokens_s"] = drawn / seconds
