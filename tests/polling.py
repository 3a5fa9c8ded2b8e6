"""Waiting for conditions."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout_s: float = 180) -> None:
    """Polls a condition; returns when it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
