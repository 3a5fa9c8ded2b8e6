"""Several generators as one: their order, their errors and their end."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from serve_app.generation.running import RunningRequests, merged


class Sources:
    """Makes generators, and keeps the names of those that have ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def items(self, name: str, *items: Any) -> AsyncGenerator[str, None]:
        """Yields strings. Waits for events in between, raises errors, and calls functions."""
        try:
            for item in items:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                elif isinstance(item, str):
                    yield item
                else:
                    item()
        finally:
            self.ended.append(name)

    async def stuck(self, name: str, *items: Any) -> AsyncGenerator[str, None]:
        """Yields strings, and never ends by itself."""
        async with aclosing(self.items(name, *items, asyncio.Event())) as events:
            async for event in events:
                yield event


async def listed(source: AsyncGenerator[str, None]) -> list[str]:
    return [item async for item in source]


def run(main: Callable[[Sources], Any]) -> list[str]:
    """Runs a test within a bounded time; returns the names of the generators that have ended."""
    sources = Sources()

    async def bounded() -> None:
        async with asyncio.timeout(5):
            await main(sources)

    asyncio.run(bounded())
    return sorted(sources.ended)


def test_items_come_as_they_are_produced() -> None:
    async def main(sources: Sources) -> None:
        turn = [asyncio.Event() for _ in range(3)]
        a = sources.items("a", "a1", turn[1], "a2", turn[2].set)
        b = sources.items("b", turn[0], "b1", turn[1].set, turn[2], "b2")
        events = merged([a, b])
        assert await anext(events) == "a1"
        turn[0].set()
        assert await listed(events) == ["b1", "a2", "b2"]

    assert run(main) == ["a", "b"]


def test_no_generators_have_no_items() -> None:
    async def main(_: Sources) -> None:
        assert await listed(merged([])) == []

    run(main)


def test_the_items_before_an_error_come_first() -> None:
    async def main(sources: Sources) -> None:
        events = merged([sources.items("a", "a1", "a2", ValueError("broken"))])
        assert [await anext(events), await anext(events)] == ["a1", "a2"]
        with pytest.raises(ValueError, match="broken"):
            await anext(events)

    run(main)


def test_the_first_error_stops_the_other_generators() -> None:
    async def main(sources: Sources) -> None:
        go_on = asyncio.Event()
        failing = sources.items("failing", go_on, ValueError("first"))
        events = merged([sources.stuck("a"), failing, sources.stuck("b", "b1")])
        assert await anext(events) == "b1"
        go_on.set()
        with pytest.raises(ValueError, match="first"):
            await anext(events)
        assert sorted(sources.ended) == ["a", "b", "failing"], "the error comes after they have ended"

    assert run(main) == ["a", "b", "failing"]


def test_closing_stops_all_generators() -> None:
    async def main(sources: Sources) -> None:
        events = merged([sources.stuck("a", "a1"), sources.stuck("b"), sources.items("c")])
        assert await anext(events) == "a1"
        await events.aclose()
        assert sorted(sources.ended) == ["a", "b", "c"]

    assert run(main) == ["a", "b", "c"]


def test_cancelling_the_listener_stops_all_generators() -> None:
    async def main(sources: Sources) -> None:
        begun = asyncio.Event()
        events = merged([sources.stuck("a", begun.set), sources.stuck("b")])
        listening = asyncio.create_task(listed(events))
        await begun.wait()
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        assert sorted(sources.ended) == ["a", "b"]

    assert run(main) == ["a", "b"]


def test_an_accepted_request_needs_its_model_only_once_it_is_ready() -> None:
    async def main(_: Sources) -> None:
        requests = RunningRequests(lambda: None)
        async with requests.add("m", frozenset({"helper"}), 2, 60) as running:
            assert (requests.needed(), requests.count(["m"]), requests.units) == ([], 1, 2)
            request: Any = object()
            requests.make_ready(running, request)
            assert requests.needed() == ["helper", "m"]
        assert (requests.needed(), requests.count(["m"]), requests.units) == ([], 0, 0)

    run(main)
