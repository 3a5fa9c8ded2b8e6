"""The four Ray Serve deployments: prior stage, decoder stage, safety checker and prompt expander."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.errors import OtherWeights
from deployments.families import Decoder, PriorEngine
from deployments.stages.base import Stage
from deployments.types import Prior

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ChatModelConfig, ClassifierConfig, ModelConfig
    from deployments.helpers.chat_model.chat_model import ChatModel
    from deployments.helpers.image_classifier.classifier import ImageClassifier
    from deployments.types import CheckRequest, Event, ExpansionRequest, ImageRequest, Pixels


class PriorStage(Stage[PriorEngine]):
    """One replica of a model's prior engine.

    Args:
        model: configuration of the model.
    """

    part = "prior"

    async def __init__(self, model: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = model
        await super().__init__(model.prior)

    def _load(self, report: Callable[[float], None]) -> PriorEngine:
        engine = self._model.traits.prior_engine().load(self._model, report)
        self.loader.thread.submit(engine.run)
        return engine

    def _facts(self, item: object) -> dict[str, int]:
        if not isinstance(item, Prior) or not item.passes:
            return {}
        return {"tokens": item.generated_tokens, "passes": item.passes}

    async def generate(
        self, request: ImageRequest, sources: tuple[Pixels, ...]
    ) -> AsyncIterator[Event | Prior]:
        """Yields the events of one unit, then its prior. A cancelled call stops as soon as the engine can.

        Args:
            request: the request without its source images.
            sources: its source images, which the caller shares among its units.
        """
        request = replace(request, sources=sources)
        items = self._answers(request, lambda engine, call: engine.submit(request, call))
        async with aclosing(items):
            async for item in items:
                yield replace(item, weights=self._model.weights) if isinstance(item, Prior) else item


class DecoderStage(Stage[Decoder]):
    """One replica of a model's decoder. It runs one unit at a time.

    Args:
        model: configuration of the model.
    """

    part = "decoder"

    async def __init__(self, model: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._model = model
        await super().__init__(model.decoder)

    def _load(self, report: Callable[[float], None]) -> Decoder:
        return self._model.traits.decoder().load(self._model, report)

    async def decode(
        self, request: ImageRequest, sources: tuple[Pixels, ...]
    ) -> AsyncIterator[Event | Pixels]:
        """Yields the events of one unit, then its pixels. A cancelled call stops within a denoising step.

        Args:
            request: the request without its source images.
            sources: its source images, which the caller shares among its units.

        Raises:
            OtherWeights: the request's prior is missing, or was made by another model.
        """
        if request.prior is None or request.prior.weights != self._model.weights:
            raise OtherWeights
        request = replace(request, sources=sources)
        items = self._answers(
            request, lambda decoder, call: self.loader.thread.submit(decoder.decode, request, call)
        )
        async with aclosing(items):
            async for item in items:
                yield item


class SafetyChecker(Stage["ImageClassifier"]):
    """One replica of the classifier. It checks one image at a time.

    Args:
        config: configuration of the classifier.
    """

    part = "safety"

    async def __init__(self, config: ClassifierConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        await super().__init__(config)

    def _load(self, report: Callable[[float], None]) -> ImageClassifier:
        from deployments.helpers.image_classifier.classifier import ImageClassifier  # imports torch

        return ImageClassifier.load(self._config, report)

    async def check(self, request: CheckRequest) -> AsyncIterator[Event | float]:
        """Yields one item: the probability that an image is unsafe, 0 to 1."""
        items = self._answers(
            request,
            lambda classifier, call: self.loader.thread.submit(classifier.score, request.pixels, call),
        )
        async with aclosing(items):
            async for item in items:
                yield item


class PromptExpander(Stage["ChatModel"]):
    """One replica of the chat model. It rewrites one prompt at a time.

    Args:
        config: configuration of the chat model.
    """

    part = "expansion"

    async def __init__(self, config: ChatModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        await super().__init__(config)

    def _load(self, report: Callable[[float], None]) -> ChatModel:
        from deployments.helpers.chat_model.chat_model import ChatModel  # imports torch

        return ChatModel.load(self._config, report)

    async def expand(self, request: ExpansionRequest) -> AsyncIterator[Event | str]:
        """Yields one item: the chat model's answer to a prompt. A cancelled call stops within a token."""
        items = self._answers(
            request, lambda model, call: self.loader.thread.submit(model.expand, request, call)
        )
        async with aclosing(items):
            async for item in items:
                yield item
