"""The decoder stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine_thread import EngineThread

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, Pixels


class DecoderStage:
    """Serves one replica of a model's decoder."""

    def __init__(self, model: ModelConfig) -> None:
        decoder = model.traits.decoder()
        self._thread = EngineThread(lambda: decoder.load(model), cpu_threads=model.decoder.cpu_threads)

    async def decode(self, request: DecodeRequest) -> Pixels:
        """Make the pixels of one unit; a cancelled call stops within a denoising step."""
        return await self._thread.run(lambda decoder, cancelled: decoder.decode(request, cancelled))
