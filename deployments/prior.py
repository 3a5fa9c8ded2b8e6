"""The prior stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine_thread import EngineThread

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from deployments.types import PriorRequest, PriorTokens


class PriorStage:
    """Serves one replica of a model's prior engine."""

    def __init__(self, model: ModelConfig) -> None:
        engine = model.traits.prior_engine()
        self._thread = EngineThread(lambda: engine.load(model), cpu_threads=model.prior.cpu_threads)

    async def generate(self, request: PriorRequest) -> PriorTokens:
        """Make the prior tokens of one unit; a cancelled call stops within a token."""
        return await self._thread.run(lambda engine, cancelled: engine.generate(request, cancelled))
