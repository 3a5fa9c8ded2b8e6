"""The decoder stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.errors import OtherWeights
from deployments.families import Decoder
from deployments.stages.base import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ModelConfig
    from deployments.types import Event, ImageRequest, Pixels


class DecoderStage(Stage[Decoder]):
    """Serves one replica of a model's decoder, a unit at a time."""

    part = "decoder"

    async def __init__(self, model: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = model
        await super().__init__(model.decoder)

    def _load(self, report: Callable[[float], None]) -> Decoder:
        return self._model.traits.decoder().load(self._model, report)

    async def decode(self, request: ImageRequest) -> AsyncIterator[Event | Pixels]:
        """Make the pixels of one unit, the last item; a cancelled call stops within a denoising step.

        Raises:
            OtherWeights: its prior is missing, or was made by another model.
        """
        if request.prior is None or request.prior.weights != self._model.weights:
            raise OtherWeights
        items = self._answers(
            request, lambda decoder, call: self._loader.thread.submit(decoder.decode, request, call)
        )
        async with aclosing(items):
            async for item in items:
                yield item
