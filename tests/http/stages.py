"""Stand-ins for everything that needs Ray or a model. They are fast, and need no weights.

The pixels of an image depend on every parameter that a model honours. Equal requests have equal pixels, and
requests that differ in one parameter have different ones.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np

from deployments.config import ModelConfig
from deployments.errors import LoadingFailed
from deployments.types import ImageRequest, Pixels, Preview, PriorTokens, Progress
from serve_app.cluster.lifecycle import Lifecycle
from serve_app.cluster.status import ModelStatuses, ReplicaReport
from serve_app.generation.generator import Generator
from serve_app.generation.unit import Model

PRIOR_SECONDS = 0.3
"""Seconds of the prior stage for a megapixel. They grow with the square of the pixels, as attention does."""
DECODER_SECONDS = 0.03
"""Seconds of the decoder stage for a megapixel and a step."""
BROKEN = "broken"
"""Name of the model that cannot be loaded."""
HONOURED = ("prompt", "width", "height", "seed", "steps", "guidance_scale", "sources")
"""Parameters that GLM-Image honours."""


def pixels_of(request: ImageRequest) -> Pixels:
    """Returns the image that the stages make of a request."""
    honoured = [_text(getattr(request, name)) for name in HONOURED]
    seed = hashlib.sha256("\0".join(honoured).encode()).digest()
    tile = np.random.default_rng(list(seed)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return np.tile(tile, (request.height // 32, request.width // 32, 1))


def _text(value: Any) -> str:
    """Returns a text that is equal for equal values: 1 and 1.0 are."""
    if isinstance(value, tuple):
        return " ".join(hashlib.sha256(source.tobytes()).hexdigest() for source in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class Stages:
    """Both stages of a model, with the concurrency of one replica each."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._prior_batch = asyncio.Semaphore(config.prior.max_batch_size)
        self._decoder = asyncio.Lock()

    @property
    def model(self) -> Model:
        return Model(config=self._config, prior=self._prior, decode=self._decode)

    async def _prior(self, request: ImageRequest) -> AsyncGenerator[Progress | PriorTokens, None]:
        if self._config.name == BROKEN:
            raise LoadingFailed("there is no checkpoint")
        async with self._prior_batch:
            yield Progress(done=0, total=1, seconds=0)
            await asyncio.sleep(PRIOR_SECONDS * (request.width * request.height / 1e6) ** 2)
        yield PriorTokens(
            target=np.zeros((request.height // 32, request.width // 32), dtype=np.int64),
            text_tokens=len(request.prompt.split()),
            source_tokens=sum(source.shape[0] * source.shape[1] for source in request.sources) // 32**2,
            generated_tokens=request.height * request.width // 32**2,
        )

    async def _decode(self, request: ImageRequest) -> AsyncGenerator[Progress | Preview | Pixels, None]:
        async with self._decoder:
            step_s = DECODER_SECONDS * request.width * request.height / 1e6
            previews = [(i + 1) * request.steps // (request.previews + 1) for i in range(request.previews)]
            for step in range(request.steps):
                yield Progress(done=step, total=request.steps, seconds=step * step_s)
                if step in previews:
                    yield Preview(index=previews.index(step), pixels=pixels_of(request)[:128, :128])
                await asyncio.sleep(step_s)
            yield pixels_of(request)


class Registry:
    """A demand registry without replicas to start or stop."""

    async def ask(self, method: str, *args: Any) -> Any:
        """Takes every order."""


class Status:
    """States of models that are always loaded."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    async def read(self, *, fresh: bool = False) -> ModelStatuses:
        """Returns the states. Both stages of the broken model have failed."""
        return {
            name: {
                stage: {"state": "failed", "reason": "there is no checkpoint"}
                if name == BROKEN
                else {"state": "ready", "replicas": 1, "done": 0}
                for stage in ("prior", "decoder")
            }
            for name in self.names
        }

    async def reports(self) -> list[ReplicaReport]:
        """Returns nothing: there are no replicas."""
        return []

    async def replicas(self, models: list[str]) -> int:
        """Returns 0: an unload has nothing to wait for."""
        return 0


def lifecycle(generator: Generator, changed: asyncio.Event) -> Lifecycle:
    """Returns the lifecycle of the stand-ins."""
    registry: Any = Registry()
    status: Any = Status([model.name for model in generator.models()])
    return Lifecycle(generator, changed, registry, status)
