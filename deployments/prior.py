"""The prior stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.calls import stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.config import ModelConfig
    from deployments.types import Event, PriorRequest, PriorTokens


class PriorStage:
    """Serves one replica of a model's prior engine, loaded and run by a thread of its own."""

    def __init__(self, model: ModelConfig) -> None:
        if model.prior.cpu_threads is not None:
            import torch  # here, so that importing the stages to wire them loads none of it

            torch.set_num_threads(model.prior.cpu_threads)
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prior")
        self._engine = thread.submit(model.traits.prior_engine().load, model).result()
        thread.submit(self._engine.run)

    async def generate(self, request: PriorRequest) -> AsyncIterator[Event | PriorTokens]:
        """Make the prior tokens of one unit, the last item; a cancelled call stops within a token."""
        items = stream(lambda call: self._engine.submit(request, call))
        async with aclosing(items):
            async for item in items:
                yield item

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._engine.fault:
            raise self._engine.fault
