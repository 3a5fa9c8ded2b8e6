"""Clients that disconnect, at every moment and with every kind of server: their requests are `cancelled`."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from deployments.types import ImageRequest, Pixels
from serve_app.http import sse
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.tables import Owner
from serve_app.observability import metrics
from tests.unit.serve_app.http import conftest
from tests.unit.serve_app.http.conftest import MakeServices, scope_of
from tests.unit.serve_app.jobs.stored import BROKEN, claimed, no_news, submitted

BEFORE_THE_ANSWER, NEVER = -1, 99
EVENTS = 3
"""Number of events of each stream here."""
GENERATIONS = "/v1/images/generations"
SERVERS = ["uvicorn", "OSError", "ClientDisconnect", "Ray"]
"""Kinds of HTTP servers. After a disconnect, uvicorn gives `http.disconnect` and drops messages, two others
raise an error in `send`, and Ray cancels the request."""


class Client:
    """A client that disconnects, and the HTTP server between it and the application.

    Args:
        server: the server, one of `SERVERS`.
        leaves_after: number of events after which the client disconnects.
        goes_on: lets the next event happen.
        body: body of the request.
    """

    def __init__(
        self, server: str, leaves_after: int, goes_on: Callable[[], Awaitable[None]], body: bytes = b""
    ) -> None:
        self.events: list[bytes] = []
        self._server = server
        self._leaves_after = leaves_after
        self._goes_on = goes_on
        self._unread = [body]
        self._has_left = asyncio.Event()
        self._happening: list[asyncio.Task[None]] = []

    async def ask(self, app: FastAPI, method: str, path: str) -> None:
        """Sends the request, and waits until the application is done with it."""
        self._leave_if(BEFORE_THE_ANSWER)
        scope = scope_of(method, path, "2.4" if self._server.endswith(("Error", "Disconnect")) else "2.3")
        request = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            if self._server == "Ray":
                leaving = asyncio.create_task(self._has_left.wait())
                await asyncio.wait([request, leaving], return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
                if self._has_left.is_set():
                    request.cancel()
            with suppress(asyncio.CancelledError):
                await request
            await asyncio.gather(*self._happening)

    def _leave_if(self, events: int) -> None:
        if events == self._leaves_after:
            self._has_left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._unread:
            return {"type": "http.request", "body": self._unread.pop(), "more_body": False}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._has_left.is_set():
            if self._server == "OSError":
                raise BrokenPipeError
            if self._server == "ClientDisconnect":
                raise ClientDisconnect
            return
        is_event = b"data: " in (chunk := message.get("body", b""))
        if is_event:
            self.events.append(chunk)
        self._leave_if(len(self.events))
        if is_event or message["type"] == "http.response.start":
            self._happening.append(asyncio.create_task(self._goes_on()))  # type: ignore[arg-type]


Ask = Callable[[str, int], Client]


@pytest.fixture(params=["generations", "job events", "fal's status stream"])
def ask(request: pytest.FixtureRequest, make_services: MakeServices, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Sends the request of a stream, whose next event happens when the client has the one before it."""
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.2)  # an error of `send` shows with the next message
    if request.param == "generations":
        return lambda server, leaves_after: ask_for_images(make_services, monkeypatch, server, leaves_after)
    api = "images" if request.param == "job events" else "fal"
    return lambda server, leaves_after: ask_for_a_job(make_services(), api, server, leaves_after)


def ask_for_images(
    make_services: MakeServices,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    leaves_after: int,
    *,
    is_broken: bool = False,
) -> Client:
    """Asks for a stream of three images."""
    may_end = asyncio.Semaphore(0)

    async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
        await may_end.acquire()
        if is_broken:
            raise RuntimeError("broken")
        yield np.zeros((request.height, request.width, 3), dtype=np.uint8)

    async def goes_on() -> None:
        may_end.release()

    monkeypatch.setattr(conftest, "decode", decode)
    body = {"prompt": "a boat", "size": "512x512", "n": EVENTS, "stream": True}
    client = Client(server, leaves_after, goes_on, json.dumps(body).encode())
    asyncio.run(client.ask(create_app(make_services()), "POST", GENERATIONS))
    return client


def ask_for_a_job(services: Services, api: str, server: str, leaves_after: int) -> Client:
    """Follows a job: it is queued, runs, and fails."""

    async def main() -> Client:
        job = await submitted(services.jobs, owner=Owner("", api), answer={"app": "m"})
        assert job.identity
        models, changes = {"m": job.identity}, iter(["runs", "ends"])

        async def goes_on() -> None:
            if len(client.events) == 0:
                return
            change = next(changes, "")
            if change == "runs":
                await claimed(services.jobs, models=models)
            elif change == "ends":
                await services.jobs.finish("w", no_news(job), "failed", error=BROKEN)

        client = Client(server, leaves_after, goes_on)
        paths = {
            "images": f"/v1/images/jobs/{job.id}/events",
            "fal": f"/queue/fal-ai/m/requests/{job.id}/status/stream",
        }
        await client.ask(create_app(services), "GET", paths[api])
        return client

    return asyncio.run(main())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, str]]]:
    """The labels of the counted requests and errors."""
    counts: dict[str, list[dict[str, str]]] = {"requests": [], "errors": []}
    monkeypatch.setattr(metrics.REQUESTS, "add", lambda **labels: counts["requests"].append(labels))
    monkeypatch.setattr(metrics.ERRORS, "add", lambda **labels: counts["errors"].append(labels))
    return counts


def ended(caplog: pytest.LogCaptureFixture, counted: dict[str, list[dict[str, str]]]) -> tuple[str, str]:
    """Returns the outcome of the request and the level of its line. The metric has the same outcome."""
    (line,) = [line for line in caplog.records if vars(line).get("event") == "request"]
    (labels,) = counted["requests"]
    outcome = str(vars(line)["outcome"])
    assert labels["outcome"] == outcome
    return outcome, line.levelname


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("leaves_after", [BEFORE_THE_ANSWER, 0, 1, EVENTS - 1])
def test_a_stream_whose_client_leaves_is_cancelled(
    caplog: pytest.LogCaptureFixture,
    counted: dict[str, list[dict[str, str]]],
    ask: Ask,
    server: str,
    leaves_after: int,
) -> None:
    caplog.set_level(logging.INFO)
    client = ask(server, leaves_after)
    assert len(client.events) == max(0, leaves_after)
    assert ended(caplog, counted) == ("cancelled", "INFO")
    assert [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("leaves_after", [EVENTS, NEVER])
def test_a_stream_whose_last_event_was_sent_has_succeeded(
    caplog: pytest.LogCaptureFixture,
    counted: dict[str, list[dict[str, str]]],
    ask: Ask,
    server: str,
    leaves_after: int,
) -> None:
    caplog.set_level(logging.INFO)
    client = ask(server, leaves_after)
    assert len(client.events) == EVENTS
    assert ended(caplog, counted) == ("succeeded", "INFO")


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("leaves_after", "outcome", "level", "errors"),
    [(0, "cancelled", "INFO", 0), (1, "failed", "ERROR", 1), (NEVER, "failed", "ERROR", 1)],
)
def test_a_stream_that_ends_with_an_error_has_failed_if_the_error_was_sent(
    caplog: pytest.LogCaptureFixture,
    counted: dict[str, list[dict[str, str]]],
    make_services: MakeServices,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    leaves_after: int,
    outcome: str,
    level: str,
    errors: int,
) -> None:
    caplog.set_level(logging.INFO)
    client = ask_for_images(make_services, monkeypatch, server, leaves_after, is_broken=True)
    assert [b"event: error" in event for event in client.events] == [True] * errors
    assert ended(caplog, counted) == (outcome, level)
    assert len(counted["errors"]) == errors


@pytest.mark.parametrize("server", SERVERS)
def test_a_request_whose_client_leaves_before_its_answer_is_cancelled(
    caplog: pytest.LogCaptureFixture,
    counted: dict[str, list[dict[str, str]]],
    make_services: MakeServices,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
) -> None:
    """An answer in one piece, which some servers take although they cannot send it, is the exception."""
    caplog.set_level(logging.INFO)

    async def never() -> None:
        pass

    body = json.dumps({"prompt": "a boat", "size": "512x512"}).encode()
    client = Client(server, BEFORE_THE_ANSWER, never, body)
    asyncio.run(client.ask(create_app(make_services()), "POST", GENERATIONS))
    expected = "succeeded" if server == "uvicorn" else "cancelled"
    assert ended(caplog, counted) == (expected, "INFO")


def test_a_request_whose_client_leaves_within_its_body_is_cancelled(
    caplog: pytest.LogCaptureFixture, counted: dict[str, list[dict[str, str]]], make_services: MakeServices
) -> None:
    caplog.set_level(logging.INFO)
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None:
        raise AssertionError("the client is gone")

    asyncio.run(create_app(make_services())(scope_of("POST", GENERATIONS), receive, send))
    assert ended(caplog, counted) == ("cancelled", "INFO")
