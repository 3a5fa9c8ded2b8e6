"""Stages and requests for tests. A request is admitted and run as a route does it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np

from deployments.types import Event as StageEvent
from deployments.types import ImageRequest, PriorTokens, Progress
from serve_app.errors import RequestError
from serve_app.generation.events import Event, GeneratedImage, in_order
from serve_app.generation.generator import Generator
from serve_app.generation.request import GenerationRequest
from serve_app.generation.running import RunningRequest
from serve_app.generation.unit import StageCall

PREVIEW = np.zeros((2, 2, 3), dtype=np.uint8)
TOKENS = PriorTokens(target=np.zeros((32, 32), dtype=np.int64))


async def prior(_: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
    yield Progress(done=256, total=1280, seconds=0.5)
    yield TOKENS


async def never(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
    yield await asyncio.Future[PriorTokens]()


def failing(error: Exception) -> StageCall:
    async def fail(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        raise error
        yield

    return fail


def request(**fields: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {"prompt": "a boat"}
    return GenerationRequest(**defaults | fields)


async def images_of(generator: Generator, **fields: Any) -> list[GeneratedImage]:
    """Returns the images of a request."""
    async with generator.admit(request(**fields)) as running:
        return await finished(generator, running)


async def finished(generator: Generator, running: RunningRequest) -> list[GeneratedImage]:
    """Returns the images of a running request."""
    async with aclosing(generator.run(running)) as events:
        return in_order([event async for event in events if isinstance(event, GeneratedImage)])


async def collect(generator: Generator, into: list[Event], **fields: Any) -> None:
    """Adds the events of a request to a list, which has those before an error too."""
    async with generator.admit(request(**fields)) as running:
        async for event in generator.run(running):
            into.append(event)  # noqa: PERF401 - an error keeps what came before it


async def outcome(generator: Generator, **fields: Any) -> str:
    """Returns `made`, or the code of the request's error."""
    try:
        await images_of(generator, **fields)
    except RequestError as error:
        return error.code
    return "made"
