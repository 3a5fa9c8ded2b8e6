"""Fixtures of the prior engine's tests: a checkpoint in our engine and in upstream's pipeline."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.families.glm_image import checkpoint
from deployments.families.glm_image.language_model import LanguageModel
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.prior import PriorEngine
from deployments.stages.calls import Call
from deployments.types import ImageRequest, Pixels, PriorTokens, TokenGrid
from tests.upstream import mended

CODEBOOK_SIZE = 256
ROWS = 3
MAX_SEQUENCE_LENGTH = 4096


def noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


REQUESTS = [
    ImageRequest(prompt="a boat", width=512, height=512, seed=1),
    ImageRequest(prompt="a longer prompt, " * 20, width=512, height=512, seed=2),
    ImageRequest(prompt="a boat", width=768, height=512, seed=3),
    ImageRequest(prompt="edit", width=512, height=512, seed=4, sources=(noise(512, 512),)),
    ImageRequest(prompt="edit", width=544, height=512, seed=5, sources=(noise(640, 512), noise(512, 608))),
]


class Loaded:
    """One checkpoint in our engine, driven by hand, and in upstream's pipeline.

    Args:
        config: configuration of the model.
        change: change applied to both models before anything runs.
        runner: class that runs the language model in our engine. The one for GPUs also works on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        change: Callable[[Any], None] | None = None,
        runner: Callable[..., LanguageModel] = CPULanguageModel,
    ) -> None:
        models = []
        for _ in range(2):
            model, self.processor = checkpoint.load_prior(config)
            if change:
                change(model)
            models.append(model)
        language_model = runner(models[0], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
        self.engine = PriorEngine(models[0], self.processor, language_model)
        self.pipeline = mended(GlmImagePipeline(None, self.processor, None, models[1], None, None, None))

    def submit(self, request: ImageRequest, call: Call | None = None) -> Future[PriorTokens]:
        """Submits a request and waits until it is in the queue."""
        future = self.engine.submit(request, call or Call())
        while not future.done() and not self.engine.wait(0.01):  # a request that cannot be prepared is done
            pass
        return future

    def ours(self, request: ImageRequest) -> PriorTokens:
        """Returns our engine's tokens."""
        future = self.submit(request)
        while self.engine.step():
            pass
        return future.result(timeout=0)

    def upstreams(self, request: ImageRequest) -> TokenGrid:
        """Returns upstream's tokens, which may include special tokens. Raises an error if upstream fails."""
        tokens, _, _ = self.pipeline.generate_prior_tokens(
            request.prompt,
            request.height,
            request.width,
            image=[[Image.fromarray(source) for source in request.sources]] if request.sources else None,
            generator=torch.Generator().manual_seed(request.seed),
        )
        grid: TokenGrid = tokens.view(request.height // 16, request.width // 16)[::2, ::2].numpy()
        return grid


@pytest.fixture(scope="session")
def config(tiny_folder: Path) -> ModelConfig:
    stage = PriorConfig(device="cpu", dtype="float32")
    return ModelConfig(
        name="m",
        family="glm_image",
        checkpoint=str(tiny_folder),
        prior=stage,
        decoder=DecoderConfig(device="cpu", dtype="float32"),
    )


@pytest.fixture(scope="session")
def loaded(config: ModelConfig) -> Loaded:
    return Loaded(config)


@pytest.fixture(scope="session")
def expected(loaded: Loaded) -> list[TokenGrid]:
    return [loaded.upstreams(request) for request in REQUESTS]


# Without its compiler, the attention takes as long for each line as for a whole prompt.
on_few_lines = partial(GPULanguageModel, speculation=4)


@pytest.fixture(scope="module")
def on_fixed_shapes(config: ModelConfig) -> Iterator[Loaded]:
    """Yields the language model for GPUs on the CPU, without its compiler."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield Loaded(config, runner=on_few_lines)
