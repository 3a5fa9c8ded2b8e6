"""A job that runs here: its task, and its news on their way into the store."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from serve_app.jobs.records import LogLine

if TYPE_CHECKING:
    from serve_app.jobs.store import JobProgress
    from serve_app.jobs.tables import Job, State

MAX_LOG_LINES = 200


@dataclass(eq=False, kw_only=True)
class ActiveJob:
    """A job that runs here.

    Attributes:
        job: the job as it was when it began.
        unfinished: number of its images that are not made yet.
        news: its progress, previews and log.
        task: the task that makes it.
        has_news: whether the store lacks some of the news.
        stopped: why it is stopped: another server has it or it is cancelled, or this server stops.
        ending: set when its outcome is being stored, so that it can no longer be stopped.
        saves: its images on their way into the file store, which nothing stops.
        previewing: its previews on their way into the file store.
        waiting: number of its images that wait for the file store.
        lines: lines of its log before the one of its end.
    """

    job: Job
    unfinished: int
    news: JobProgress
    task: asyncio.Task[None] | None = None
    has_news: bool = True
    stopped: Literal["", "taken or cancelled", "server stops"] = ""
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    saves: list[asyncio.Task[tuple[str, int]]] = field(default_factory=list)
    previewing: set[asyncio.Task[None]] = field(default_factory=set)
    waiting: int = 0
    lines: int | None = None

    @property
    def is_ending(self) -> bool:
        """Whether its outcome is being stored."""
        return self.ending.is_set()

    async def pause(self, seconds: float) -> bool:
        """Waits, but no longer than until it is ending. Returns whether it goes on."""
        if not self.stopped:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.ending.wait()
        return not self.stopped and not self.is_ending

    def stop(self, why: Literal["taken or cancelled", "server stops"]) -> None:
        """Stops it, unless it is ending."""
        if not self.is_ending and not self.stopped and self.task:
            self.stopped = why
            self.task.cancel()

    def log(self, message: str) -> None:
        """Adds a line to its log."""
        if len(self.news.log) < MAX_LOG_LINES:
            self.news.log.append(LogLine(at=time.time(), message=message))
            self.has_news = True

    def log_end(self, state: State) -> None:
        """Adds the last line to its log, in place of one that `log_end` has added before."""
        self.lines = len(self.news.log) if self.lines is None else self.lines
        self.news.log[self.lines :] = [LogLine(at=time.time(), message=state)]
