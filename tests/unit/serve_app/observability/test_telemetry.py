"""The log line of a request: its facts and its level."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve  # noqa: F401 - now, since it sets up the logger

from serve_app.observability import telemetry
from serve_app.observability.recent import Recent
from serve_app.observability.telemetry import Requests

App = Callable[..., Awaitable[None]]


def answering(status: int, **facts: str) -> App:
    async def app(_: Any, __: Any, send: Any) -> None:
        telemetry.note(**facts)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})

    return app


def breaking(code: str, status: int) -> App:
    """Returns an application whose stream ends with an error."""

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        telemetry.note_error(code, status)
        await send({"type": "http.response.body"})

    return app


async def broken(*_: object) -> None:
    raise RuntimeError


async def left(*_: object) -> None:
    raise asyncio.CancelledError


async def left_by_an_error(_: Any, receive: Any, __: Any) -> None:
    await receive()
    raise ConnectionResetError


async def broken_after_leaving(_: Any, receive: Any, __: Any) -> None:
    await receive()
    raise RuntimeError


async def broken_by_a_disk(*_: object) -> None:
    raise OSError


async def left_before_the_end(_: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await receive()
    await send({"type": "http.response.body"})


async def left_after_the_end(_: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})
    await receive()


async def left_a_stream(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})


@pytest.mark.parametrize(
    ("app", "path", "level", "outcome"),
    [
        (answering(200), "/v1/models", "INFO", "succeeded"),
        (answering(404, error="not_found"), "/v1/models", "INFO", "refused"),
        (answering(429, error="busy"), "/v1/models", "WARNING", "rejected"),
        (answering(503, error="stopping"), "/v1/models", "WARNING", "rejected"),
        (answering(503, error="unavailable"), "/v1/models", "ERROR", "failed"),
        (breaking("server_error", 500), "/v1/models", "ERROR", "failed"),
        (breaking("moderation_blocked", 400), "/v1/models", "INFO", "refused"),
        (broken, "/v1/models", "ERROR", "failed"),
        (left, "/v1/models", "INFO", "cancelled"),
        (left_a_stream, "/v1/models", "INFO", "cancelled"),
        (left_by_an_error, "/v1/models", "INFO", "cancelled"),
        (left_before_the_end, "/v1/models", "INFO", "cancelled"),
        (left_after_the_end, "/v1/models", "INFO", "succeeded"),
        (broken_after_leaving, "/v1/models", "ERROR", "failed"),
        (broken_by_a_disk, "/v1/models", "ERROR", "failed"),
        (answering(200), "/health", "DEBUG", "succeeded"),
        (answering(503, error="stopping"), "/readyz", "WARNING", "rejected"),
    ],
)
def test_the_level_of_a_line_shows_whether_an_operator_should_look(
    caplog: pytest.LogCaptureFixture, app: App, path: str, level: str, outcome: str
) -> None:
    caplog.set_level(logging.DEBUG, "ray.serve")
    run(app, path)
    (line,) = caplog.records
    assert line.levelname == level
    facts = vars(line)
    assert (facts["event"], facts["outcome"], facts["route"]) == ("request", outcome, path)
    assert "error_status" not in facts


def test_the_facts_of_concurrent_requests_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, _: Any, send: Any) -> None:
        telemetry.note(model=scope["path"])
        await asyncio.sleep(0.01)
        noting = asyncio.create_task(asyncio.to_thread(telemetry.note, n=len(scope["path"])))
        await noting  # a task that the request starts has its facts
        await send({"type": "http.response.start", "status": 200, "headers": []})

    caplog.set_level(logging.DEBUG, "ray.serve")
    run(app, "/a", "/bb")
    assert {(line.__dict__["model"], line.__dict__["n"]) for line in caplog.records} == {
        ("/a", 2),
        ("/bb", 3),
    }


def test_a_note_outside_of_a_request_has_no_effect() -> None:
    telemetry.note(model="m")


def run(app: App, *paths: str) -> None:
    """Sends requests at the same time. Their errors are the application's business."""

    async def disconnected() -> Any:
        return {"type": "http.disconnect"}

    async def nowhere(_: Any) -> None:
        pass

    async def send(path: str) -> None:
        route = SimpleNamespace(path=path)
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "route": route}
        await Requests(app, lambda _: "openai", (OSError,), Recent())(scope, disconnected, nowhere)

    async def main() -> None:
        await asyncio.gather(*map(send, paths))

    with suppress(RuntimeError, OSError, asyncio.CancelledError):
        asyncio.run(main())
