"""Requests that run: which models they need, when they end, and how to abort them."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from serve_app.errors import RequestError, TimedOut, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable

    from serve_app.generation.gate import Turn
    from serve_app.generation.request import ResolvedRequest

Item = TypeVar("Item")


@dataclass(eq=False, kw_only=True)
class RunningRequest:
    """A request that was accepted. It is ready for its model once its source images are decoded.

    Attributes:
        model: name of its model.
        helpers: names of the helpers that it needs.
        units: number of its images.
        timeout: ends it at its deadline, or when it is aborted.
        deadline: its deadline, on the clock of the event loop.
        deadline_s: seconds from its acceptance to its deadline.
        start_within_s: seconds in which a stage must begin; None for no limit.
        turn: turn of a job's first image; None for a request that somebody waits for.
    """

    model: str
    helpers: frozenset[str]
    units: int
    timeout: asyncio.Timeout
    deadline: float
    deadline_s: float
    start_within_s: float | None = None
    turn: Turn | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: bool = False
    _request: ResolvedRequest | None = None
    _has_started: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it is ready for its model."""
        return self._request is not None

    @property
    def request(self) -> ResolvedRequest:
        """The request with all its parameters, once it is ready."""
        if self._request is None:
            raise RuntimeError("the request is not ready")
        return self._request

    def make_ready(self, request: ResolvedRequest) -> None:
        """Makes it ready for its model."""
        self._request = request

    def turn_of(self, image: int) -> Turn | None:
        """Returns the turn of one image: images of other keys' jobs come between a job's images."""
        if self.turn is None:
            return None
        return self.turn._replace(work=self.turn.work + image * self.request.work / self.request.n)

    def note_start(self) -> None:
        """Notes that a stage has begun with it: `start_within_s` no longer applies."""
        if not self._has_started and not self.aborted and not self.timeout.expired():
            self._has_started = True
            self.timeout.reschedule(self.deadline)

    def abort(self) -> None:
        """Stops it now, since its model is to be unloaded."""
        if not self.timeout.expired():
            self.aborted = True
            self.timeout.reschedule(asyncio.get_running_loop().time())

    def why_stopped(self) -> RequestError:
        """Returns the error for a request that was stopped before its end."""
        if self.aborted:
            return Unavailable(
                f"The request was stopped: {self.model} was unloaded by hand. Send it again to load it.",
                code="unloaded",
                retryable=False,
            )
        if self.start_within_s is not None and not self._has_started:
            return TimedOut(
                f"The request did not start within {self.start_within_s:g} s; allow more time, or try again "
                "later.",
                code="start_timeout",
            )
        return TimedOut(
            f"The request took longer than the {self.deadline_s:g} s allowed and was stopped. If the model "
            "was still loading, try again later; else ask for fewer images or steps, or for a smaller size."
        )


class RunningRequests:
    """All requests that run in this process.

    Args:
        on_change: called when a request is ready for its model, and when it ends.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._all: list[RunningRequest] = []

    @asynccontextmanager
    async def add(
        self,
        model: str,
        helpers: frozenset[str],
        units: int,
        deadline_s: float,
        start_within_s: float | None = None,
    ) -> AsyncIterator[RunningRequest]:
        """Runs a request within the block; see `RunningRequest`.

        Raises:
            TimedOut: its deadline has passed.
            Unavailable: it was aborted.
        """
        if start_within_s is not None and start_within_s >= deadline_s:
            start_within_s = None
        deadline = asyncio.get_running_loop().time() + deadline_s
        timeout = asyncio.timeout(deadline_s if start_within_s is None else start_within_s)
        running = RunningRequest(
            model=model,
            helpers=helpers,
            units=units,
            timeout=timeout,
            deadline=deadline,
            deadline_s=deadline_s,
            start_within_s=start_within_s,
        )
        try:
            async with timeout:
                self._all.append(running)
                yield running
        except TimeoutError:
            if not timeout.expired():
                raise
            raise running.why_stopped() from None
        finally:
            self._all.remove(running)
            self._on_change()
            running.ended.set()

    def make_ready(self, running: RunningRequest, request: ResolvedRequest) -> None:
        """Makes a request that was added ready for its model."""
        running.make_ready(request)
        self._on_change()

    @property
    def units(self) -> int:
        """Number of images of all running requests."""
        return sum(running.units for running in self._all)

    def needed(self) -> list[str]:
        """Returns the names of the models and helpers that have work."""
        ready = [running for running in self._all if running.is_ready]
        return sorted({name for running in ready for name in (running.model, *running.helpers)})

    def counts(self) -> dict[str, int]:
        """Returns the number of requests of each model that has any."""
        return dict(Counter(running.model for running in self._all))

    def count(self, models: Collection[str]) -> int:
        """Returns the number of requests of these models."""
        return sum(running.model in models for running in self._all)

    def abort(self, models: Collection[str]) -> None:
        """Stops the requests of these models."""
        for running in self._all:
            if running.model in models:
                running.abort()

    async def until_idle(self, models: Collection[str]) -> None:
        """Returns when no request of these models runs."""
        while ours := [running for running in self._all if running.model in models]:
            await ours[0].ended.wait()


async def merged(sources: Iterable[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Yields the items of several generators as they come.

    Each generator runs in a task of its own. The first error stops all of them and is raised. Closing this
    generator stops them too.
    """
    queue: asyncio.Queue[Item | asyncio.Task[None]] = asyncio.Queue()

    async def drain(source: AsyncGenerator[Item, None]) -> None:
        async with aclosing(source):
            async for item in source:
                queue.put_nowait(item)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
