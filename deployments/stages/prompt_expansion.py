"""The prompt expander: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.stages.base import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ChatModelConfig
    from deployments.helpers.chat_model.chat_model import ChatModel
    from deployments.types import Event, ExpansionRequest


class PromptExpander(Stage["ChatModel"]):
    """Serves one replica of the chat model, a prompt at a time."""

    part = "expansion"

    async def __init__(self, config: ChatModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        await super().__init__(config)

    def _load(self, report: Callable[[float], None]) -> ChatModel:
        from deployments.helpers.chat_model.chat_model import ChatModel  # which loads torch

        return ChatModel.load(self._config, report)

    async def expand(self, request: ExpansionRequest) -> AsyncIterator[Event | str]:
        """What the chat model makes of a prompt, the only item; a cancelled call stops within a token."""
        items = self._answers(
            request, lambda model, call: self._loader.thread.submit(model.expand, request, call)
        )
        async with aclosing(items):
            async for item in items:
                yield item
