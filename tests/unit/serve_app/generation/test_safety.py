"""The safety check: thresholds, and the policy for images that cannot be checked."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import numpy as np
import pytest

from deployments.errors import LoadingFailed, NotANumber
from deployments.types import CheckRequest, Event
from serve_app.config import SafetyCheckerConfig
from serve_app.errors import Busy, Failed, ReplicaDied
from serve_app.generation.request import Moderation
from serve_app.generation.safety import SafetyCheck

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)
Checker = Callable[[CheckRequest], AsyncGenerator[Event | float, None]]


def scoring(*answers: float | Exception) -> Checker:
    """Returns a checker that gives one answer after the other."""
    left = list(answers)

    async def check(_: CheckRequest) -> AsyncGenerator[Event | float, None]:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield answer

    return check


def risk(checker: Checker, moderation: Moderation = "auto", **config: Any) -> float | None:
    check = SafetyCheck(SafetyCheckerConfig(**config), checker)
    return asyncio.run(check.risk(IMAGE, moderation))


def test_an_image_is_flagged_from_the_threshold_on() -> None:
    assert risk(scoring(0.25)) == 0.5
    assert risk(scoring(0.5)) == 1
    assert risk(scoring(0.6), threshold=0.8) == pytest.approx(0.75)


def test_the_low_strictness_has_a_threshold_of_its_own() -> None:
    assert risk(scoring(), "low") is None
    assert risk(scoring(0.5), "low", low_threshold=1) == 0.5
    assert not SafetyCheck(SafetyCheckerConfig(), scoring()).enabled_for("low")
    assert SafetyCheck(SafetyCheckerConfig(low_threshold=0.9), scoring()).enabled_for("low")


def test_a_checker_that_dies_is_called_once_more() -> None:
    assert risk(scoring(ReplicaDied(), 0.1)) == 0.2


async def never(_: CheckRequest) -> AsyncGenerator[Event | float, None]:
    await asyncio.Event().wait()
    yield 0.0


@pytest.mark.parametrize(
    "checker",
    [
        lambda: scoring(ReplicaDied(), ReplicaDied()),
        lambda: scoring(LoadingFailed("no such folder")),
        lambda: scoring(NotANumber("nan")),
        lambda: scoring(Busy("busy")),
        lambda: scoring(RuntimeError("broken")),
        lambda: never,
    ],
)
def test_an_unchecked_image_is_an_error_or_is_delivered_as_configured(
    checker: Callable[[], Checker],
) -> None:
    assert risk(checker(), on_failure="open", timeout_s=0.1) is None
    with pytest.raises(Failed) as failed:
        risk(checker(), timeout_s=0.1)
    assert (failed.value.code, failed.value.retryable) == ("safety_check_failed", False)


def test_a_cancelled_check_is_not_a_failed_one() -> None:
    async def leave() -> None:
        check = SafetyCheck(SafetyCheckerConfig(on_failure="open"), never)
        checking = asyncio.create_task(check.risk(IMAGE, "auto"))
        await asyncio.sleep(0)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking

    asyncio.run(leave())
