"""The prior stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.families import PriorEngine
from deployments.stages.base import Stage
from deployments.types import Prior

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ModelConfig
    from deployments.types import Event, ImageRequest


class PriorStage(Stage[PriorEngine]):
    """Serves one replica of a model's prior engine."""

    part = "prior"

    async def __init__(self, model: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = model
        await super().__init__(model.prior)

    def _load(self, report: Callable[[float], None]) -> PriorEngine:
        engine = self._model.traits.prior_engine().load(self._model, report)
        self._loader.thread.submit(engine.run)
        return engine

    async def generate(self, request: ImageRequest) -> AsyncIterator[Event | Prior]:
        """Make the prior of one unit, the last item; a cancelled call stops as soon as the engine can."""
        items = self._answers(request, lambda engine, call: engine.submit(request, call))
        async with aclosing(items):
            async for item in items:
                yield replace(item, weights=self._model.weights) if isinstance(item, Prior) else item
