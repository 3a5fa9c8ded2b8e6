"""The safety checker: what a replica of its Ray Serve deployment runs."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.stages.base import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deployments.config import ClassifierConfig
    from deployments.helpers.image_classifier.classifier import ImageClassifier
    from deployments.types import CheckRequest, Event


class SafetyChecker(Stage["ImageClassifier"]):
    """Serves one replica of the classifier, an image at a time."""

    part = "safety"

    async def __init__(self, config: ClassifierConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        await super().__init__(config)

    def _load(self, report: Callable[[float], None]) -> ImageClassifier:
        from deployments.helpers.image_classifier.classifier import ImageClassifier  # which loads torch

        return ImageClassifier.load(self._config, report)

    async def check(self, request: CheckRequest) -> AsyncIterator[Event | float]:
        """How probable it is that an image is unsafe, 0 to 1: the only item."""
        items = self._answers(
            request,
            lambda classifier, call: self._loader.thread.submit(classifier.score, request.pixels, call),
        )
        async with aclosing(items):
            async for item in items:
                yield item
