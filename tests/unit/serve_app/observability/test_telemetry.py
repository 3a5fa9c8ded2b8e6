"""The line of a request: what it says, and how loudly."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve  # noqa: F401 - now, since it sets up the logger

from serve_app.observability.telemetry import Requests

App = Callable[..., Awaitable[None]]


def answering(status: int, **facts: str) -> App:
    async def app(scope: dict[str, Any], _: Any, send: Any) -> None:
        scope["state"]["log"] |= facts
        await send({"type": "http.response.start", "status": status, "headers": []})

    return app


async def broken(*_: object) -> None:
    raise RuntimeError


async def left(*_: object) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("app", "path", "level", "outcome"),
    [
        (answering(200), "/v1/models", "INFO", "succeeded"),
        (answering(404, error="not_found"), "/v1/models", "INFO", "refused"),
        (answering(429, error="busy"), "/v1/models", "WARNING", "rejected"),
        (answering(503, error="stopping"), "/v1/models", "WARNING", "rejected"),
        (answering(503, error="unavailable"), "/v1/models", "ERROR", "failed"),
        (answering(200, error="server_error"), "/v1/models", "ERROR", "failed"),
        (broken, "/v1/models", "ERROR", "failed"),
        (left, "/v1/models", "INFO", "cancelled"),
        (answering(200), "/health", "DEBUG", "succeeded"),
        (answering(503, error="stopping"), "/readyz", "WARNING", "rejected"),
    ],
)
def test_its_level_says_whether_somebody_should_look(
    caplog: pytest.LogCaptureFixture, app: App, path: str, level: str, outcome: str
) -> None:
    route = SimpleNamespace(path=path)
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "route": route}

    async def nowhere(_: Any) -> None:
        pass

    async def ask() -> None:
        await Requests(app, lambda _: "openai")(scope, nowhere, nowhere)  # type: ignore[arg-type]

    caplog.set_level(logging.DEBUG, "ray.serve")
    with suppress(RuntimeError, asyncio.CancelledError):
        asyncio.run(ask())
    (line,) = caplog.records
    assert line.levelname == level
    facts = vars(line)
    assert (facts["event"], facts["outcome"], facts["route"]) == ("request", outcome, path)
