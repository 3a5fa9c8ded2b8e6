"""A replica that cannot serve ends its process, so that its callers try another one. Without Ray."""

import asyncio
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.config import PriorConfig
from deployments.errors import LoadingFailed
from deployments.observability import tracing
from deployments.stages import base
from deployments.types import ImageRequest

CONTEXT = SimpleNamespace(replica_tag="r1", deployment="m-prior")


class Broken(base.Stage[Any]):
    """A stage that cannot be loaded."""

    part = "prior"
    tries = 0

    def _load(self, report: Callable[[float], None]) -> Any:
        self.tries += 1
        if self.tries < 3:
            raise OSError("no such folder")
        return SimpleNamespace(done=0, fault=None)

    async def ask(self) -> None:
        request = ImageRequest(prompt="a boat", width=512, height=512, seed=1, submitted_at=time.time())
        start: Any = None
        async for _ in self._answers(request, start):
            pass


@pytest.mark.parametrize("becomes_ready", [False, True])
def test_a_replica_that_cannot_be_loaded_leaves_its_requests_to_one_that_is_ready(
    monkeypatch: pytest.MonkeyPatch, *, becomes_ready: bool
) -> None:
    ended: list[int] = []
    ready = False
    reporter = SimpleNamespace(report=lambda _: None, has_ready_sibling=lambda: ready, leave=lambda: None)
    monkeypatch.setattr(base, "Reporter", lambda: reporter)
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: CONTEXT)
    monkeypatch.setattr(tracing, "start", lambda _: None)
    monkeypatch.setattr(os, "_exit", ended.append)

    async def main() -> None:
        nonlocal ready
        stage = Broken.__new__(Broken)
        await stage.__init__(PriorConfig(device="cpu", dtype="float32"))  # type: ignore[misc]
        ready = becomes_ready
        with pytest.raises(LoadingFailed, match="no such folder"):
            await stage.ask()

    asyncio.run(main())
    assert ended == [1] * becomes_ready


def test_a_replica_whose_retry_succeeds_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: CONTEXT)
    monkeypatch.setattr(tracing, "start", lambda _: None)
    monkeypatch.setattr(os, "_exit", ended.append)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def retry_first() -> bool:
            retry = stage.loader.engine(time.time())
            asyncio.run_coroutine_threadsafe(retry, loop).result(10)
            return True  # its own report, by now

        reporter = SimpleNamespace(report=lambda _: None, has_ready_sibling=lambda: False, leave=lambda: None)
        monkeypatch.setattr(base, "Reporter", lambda: reporter)
        stage = Broken.__new__(Broken)
        await stage.__init__(PriorConfig(device="cpu", dtype="float32"))  # type: ignore[misc]
        reporter.has_ready_sibling = retry_first
        with pytest.raises(LoadingFailed, match="no such folder"):
            await stage.ask()

    asyncio.run(main())
    assert not ended
