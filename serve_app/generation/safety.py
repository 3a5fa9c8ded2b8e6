"""Whether images are fit to be shown: those that users send, and those that are made for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from deployments.observability import tracing
from deployments.observability.log import FAULT
from deployments.types import CheckRequest, Event
from serve_app.errors import NO_RETRY, ReplicaDied, RequestError

if TYPE_CHECKING:
    from deployments.types import Pixels
    from serve_app.config import SafetyCheckerConfig
    from serve_app.generation.request import Moderation

logger = logging.getLogger("ray.serve")

NAME = "safety checker"
"""By which it is needed and unloaded, as models are by theirs, in which there are no blanks."""
VIOLATION = "content_policy_violation"
"""The code of errors over what was flagged."""

Check = Callable[[CheckRequest], AsyncGenerator[Event | float, None]]


class SafetyCheck:
    """Asks the safety checker.

    Args:
        config: from where on an image is flagged, and what becomes of those that cannot be checked.
        check: the checker's method.
    """

    def __init__(self, config: SafetyCheckerConfig, check: Check) -> None:
        self._config = config
        self._check = check

    def looks(self, moderation: Moderation) -> bool:
        """Whether images are checked at all."""
        return self._threshold(moderation) is not None

    async def risk(self, pixels: Pixels, moderation: Moderation, request_id: str = "") -> float | None:
        """How unsafe an image is, in parts of what is flagged: from 1 on it is. None if it was not checked.

        Args:
            pixels: the image.
            moderation: how strictly it is checked.
            request_id: of the request that it belongs to.

        Raises:
            RequestError: 500, it could not be checked, and is not to be shown then.
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
            raise RequestError(
                "The image could not be checked by the safety checker; the server's log says why.",
                code="safety_check_failed",
                status=500,
                headers=NO_RETRY,
            ) from error

    def _threshold(self, moderation: Moderation) -> float | None:
        return self._config.low_threshold if moderation == "low" else self._config.threshold

    async def _score(self, pixels: Pixels, request_id: str) -> float:
        """From 0 to 1; it is asked for once more if the checker's replica dies."""
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
