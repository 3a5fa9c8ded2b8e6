"""The safety check of source images, previews and results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.observability import tracing
from deployments.observability.log import FAULT
from deployments.types import CheckRequest, Event
from serve_app.errors import Failed, ReplicaDied

if TYPE_CHECKING:
    from deployments.types import Pixels
    from serve_app.config import SafetyCheckerConfig
    from serve_app.generation.request import Moderation

logger = logging.getLogger("ray.serve")

NAME = "safety checker"
"""Name for loading and unloading. It contains a space, so no model can have it."""
VIOLATION = "content_policy_violation"
"""Code of the errors for flagged images."""

Check = Callable[[CheckRequest], AsyncGenerator[Event | float, None]]


class SafetyCheck:
    """Calls the safety checker.

    Args:
        config: its thresholds, and the policy for images that cannot be checked.
        check: the checker's method.
    """

    def __init__(self, config: SafetyCheckerConfig, check: Check) -> None:
        self._config = config
        self._check = check

    def enabled_for(self, moderation: Moderation) -> bool:
        """Returns whether images are checked at this strictness."""
        return self._threshold(moderation) is not None

    async def risk(self, pixels: Pixels, moderation: Moderation, request_id: str = "") -> float | None:
        """Returns an image's score relative to the threshold: 1 or more is flagged, None is unchecked.

        Args:
            pixels: the image.
            moderation: strictness of the check.
            request_id: id of the request.

        Raises:
            Failed: it could not be checked, and `on_failure` is `closed`.
        """
        threshold = self._threshold(moderation)
        if threshold is None:
            return None
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await self._score(pixels, request_id) / threshold
        except Exception as error:
            logger.exception("an image could not be checked", extra=FAULT)
            if self._config.on_failure == "open":
                return None
            raise Failed(
                "The safety checker could not check the image; the server's log says why.",
                code="safety_check_failed",
            ) from error

    def _threshold(self, moderation: Moderation) -> float | None:
        return self._config.low_threshold if moderation == "low" else self._config.threshold

    async def _score(self, pixels: Pixels, request_id: str) -> float:
        """Returns the score, 0 to 1. Calls the checker once more if its replica dies."""
        request = CheckRequest(pixels=pixels, request_id=request_id, traceparent=tracing.traceparent())
        try:
            return await self._ask(request)
        except ReplicaDied:
            return await self._ask(request)

    async def _ask(self, request: CheckRequest) -> float:
        score = None
        async with aclosing(self._check(request)) as events:
            async for event in events:
                if isinstance(event, float):
                    score = event
        if score is None:
            raise ReplicaDied
        return score
