"""The decoder stage: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.calls import stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, Event, Pixels


class DecoderStage:
    """Serves one replica of a model's decoder, loaded and run by a thread of its own, a unit at a time."""

    def __init__(self, model: ModelConfig) -> None:
        if model.decoder.cpu_threads is not None:
            import torch  # here, so that importing the stages to wire them loads none of it

            torch.set_num_threads(model.decoder.cpu_threads)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self._decoder = self._thread.submit(model.traits.decoder().load, model).result()

    async def decode(self, request: DecodeRequest) -> AsyncIterator[Event | Pixels]:
        """Make the pixels of one unit, the last item; a cancelled call stops within a denoising step."""
        items = stream(lambda call: self._thread.submit(self._decoder.decode, request, call))
        async with aclosing(items):
            async for item in items:
                yield item

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._decoder.fault:
            raise self._decoder.fault
