"""The two engines with random weights, built and called as the stages do."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.config import Acceleration, DecoderConfig
from deployments.engines import acceleration
from deployments.families.glm_image.decoder import Decoder
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.pipeline import DecoderPipeline
from deployments.families.glm_image.prior import PriorEngine, on_its_device
from deployments.stages.calls import Call
from deployments.types import ImageRequest, PriorTokens, Progress
from tests.gpu import measure, models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from deployments.types import Pixels
    from tests.gpu.rows import Run

PROMPT = "A red boat at dawn"
ROWS = 8
MAX_SEQUENCE_LENGTH = 24_576
"""Batch size and sequence length of the default configuration."""
MAX_SLEEP_S = 0.1
"""Seconds after which a condition is checked again if nothing else happens."""


@contextmanager
def stage_log() -> Iterator[list[str]]:
    """Collects the lines that the stages log."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, collector = logging.getLogger("ray.serve"), Collector()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(collector)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


@dataclass(kw_only=True)
class Prior:
    """A prior engine.

    Attributes:
        engine: engine of the prior stage.
        language_model: language model of the engine.
    """

    engine: PriorEngine
    language_model: Any


def load_prior(run: Run, device: torch.device, *, as_on_gpu: bool = False) -> Prior:
    """Builds the prior engine, and writes its times and memory.

    Args:
        run: step of the window.
        device: device of the engine.
        as_on_gpu: whether to use the GPU's engine on every device. It is slow on a CPU.
    """
    with run.figure("prior, weights") as values:
        (model, processor), values["seconds"] = measure.seconds(
            lambda: models.prior(device, tiny_size=run.tiny), device
        )
        values["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    max_sequence_length = run.count(MAX_SEQUENCE_LENGTH, 1024)

    def language_model() -> Any:
        if as_on_gpu:
            return GPULanguageModel(model, rows=ROWS, max_sequence_length=max_sequence_length)
        return on_its_device(model, ROWS, max_sequence_length)

    with run.figure(
        "prior, compiled and captured", rows=ROWS, max_sequence_length=max_sequence_length
    ) as values:
        memory = measure.Memory(device)
        with stage_log() as lines:
            loaded, values["seconds"] = measure.seconds(language_model, device)
        values["predicted"] = lines
        values |= memory.values() | measure.graphs()
    return Prior(engine=PriorEngine(model, processor, loaded), language_model=loaded)


def prior_request(side: int, *, seed: int = 0, sources: int = 0, source_side: int = 0) -> ImageRequest:
    """Returns a request for the prior of a square image."""
    images = source_images(sources, source_side)
    return ImageRequest(prompt=PROMPT, width=side, height=side, seed=seed, sources=images)


def source_images(count: int, side: int) -> tuple[Pixels, ...]:
    """Returns images of noise."""
    random = np.random.default_rng(0)
    return tuple(random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count))


def generate(prior: Prior, requests: Sequence[ImageRequest]) -> tuple[list[PriorTokens], float]:
    """Runs requests concurrently. Returns their answers, and the seconds until the last one."""
    began = time.perf_counter()
    futures = [prior.engine.submit(request, Call()) for request in requests]
    step_until(prior.engine, lambda: all(future.done() for future in futures))
    return [future.result() for future in futures], time.perf_counter() - began


def step_until(engine: PriorEngine, is_over: Callable[[], bool]) -> None:
    """Runs the engine until a condition holds. It sleeps while nothing is ready, as in a stage.

    If it did not sleep, it would keep Python's global lock from the thread that prepares requests. On an H200
    that made the first token 0.3 s later.
    """
    while not is_over():
        if not engine.step() and not is_over():
            engine.wait(MAX_SLEEP_S)


@dataclass(kw_only=True)
class LoadedDecoder:
    """A loaded decoder.

    Attributes:
        engine: engine of the decoder stage.
        pipeline: pipeline of the engine.
        config: configuration of the stage.
        weights_gb: gigabytes of all weights.
        predicted: the stage's log messages about its memory.
    """

    engine: Decoder
    pipeline: DecoderPipeline
    config: DecoderConfig
    weights_gb: float
    predicted: list[str]


def load_decoder(run: Run, device: torch.device, *, side: int, **chosen: Any) -> LoadedDecoder:
    """Builds a decoder as a stage does, with its weights on the device or offloaded.

    Args:
        run: step of the window.
        device: device of the decoder.
        side: side of the largest image, in pixels.
        chosen: fields of `deployments.config.Acceleration`. The defaults are those of a stage on a GPU.
    """
    config = DecoderConfig(
        device=run.device,
        deployment={"ray_actor_options": {"num_gpus": 1}},
        acceleration=Acceleration(**{"compile": None if run.on_gpu else True} | chosen),
    )
    pipeline = DecoderPipeline(**models.decoder(device, tiny_size=run.tiny))
    if config.acceleration.offload in ("model", "group"):
        pipeline.to("cpu")
    weights = sum(
        parameter.nbytes
        for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
        for parameter in part.parameters()
    )
    with stage_log() as lines:
        acceleration.apply(pipeline, config, max_side=side)
    return LoadedDecoder(
        engine=Decoder(pipeline),
        pipeline=pipeline,
        config=config,
        weights_gb=weights / 1e9,
        predicted=lines,
    )


def unit(
    run: Run,
    side: int,
    steps: int,
    *,
    sources: int = 0,
    source_side: int = 0,
    prior: PriorTokens | None = None,
) -> ImageRequest:
    """Returns a decoder request for a square image. The prior tokens are random by default."""
    random = np.random.default_rng(0)
    codebook = 256 if run.tiny else models.CODEBOOK
    grids = [
        random.integers(0, codebook, (pixels // 32, pixels // 32))
        for pixels in (side, *[source_side] * sources)
    ]
    return ImageRequest(
        prompt=PROMPT,
        width=side,
        height=side,
        seed=0,
        steps=steps,
        guidance_scale=1.5,
        prior=prior or PriorTokens(target=grids[0], sources=tuple(grids[1:])),
        sources=source_images(sources, source_side),
    )


@dataclass(frozen=True, kw_only=True)
class Painted:
    """An image and its times.

    Attributes:
        pixels: pixels of the image.
        seconds: total seconds.
        step_s: mean seconds of a step, without the first.
        rest_s: seconds after the last step, almost all of them in the VAE.
    """

    pixels: Pixels
    seconds: float
    step_s: float
    rest_s: float

    def seconds_for(self, steps: int, made: int) -> float:
        """Extrapolates the seconds to another number of steps, because all steps take equally long.

        Args:
            steps: steps of the other image.
            made: steps of this image.
        """
        return self.seconds + (steps - made) * self.step_s


def paint(decoder: Decoder, request: ImageRequest, device: torch.device) -> Painted:
    """Decodes an image, and measures it."""
    ends: list[float] = []

    def report(event: object) -> None:
        if isinstance(event, Progress):
            ends.append(time.perf_counter())

    measure.synchronize(device)
    began = time.perf_counter()
    pixels = decoder.decode(request, Call(report=report))
    end = time.perf_counter()
    return Painted(
        pixels=pixels,
        seconds=end - began,
        step_s=(ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else float("nan"),
        rest_s=end - ends[-1],
    )


def difference(one: Pixels, other: Pixels) -> float:
    """Returns the mean difference of two images, between 0 and 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())
