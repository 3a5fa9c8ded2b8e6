"""Tells those who asked for it when their jobs have ended: at least once, and again until they take it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import RequestError
from serve_app.jobs.store import Job
from serve_app.observability import metrics
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serve_app.jobs.signing import Signer
    from serve_app.jobs.store import JobStore
    from serve_app.outbound import Outbound

logger = logging.getLogger("ray.serve")

PAUSES_S = (5, 15, 60, 120, 300, 600, 1200, 1800, 3600)
"""After each try that failed; there is one more try than pauses, and the last one comes some two hours after
the first."""
TRIES = len(PAUSES_S) + 1
AT_ONCE = 16
LOOK_S = 1.0
GONE = 410
"""An answer that means: never again."""


@dataclass(frozen=True)
class Message:
    """What is posted."""

    body: bytes
    headers: Mapping[str, str]


Sign = Callable[[bytes], Awaitable[bytes]]
Compose = Callable[[Job, int, Sign], Awaitable[Message]]


class Webhooks:
    """Delivers what is due. Where it stands is in the job, so that a restart forgets nothing.

    Args:
        store: of the jobs.
        outbound: the way out.
        signer: signs the messages.
        compose: for each API, makes its message from an ended job, the time in seconds since 1970 and a
            function that signs.
        timeout_s: for which one try may last.
    """

    def __init__(
        self,
        store: JobStore,
        outbound: Outbound,
        signer: Signer,
        compose: Mapping[str, Compose],
        timeout_s: float,
    ) -> None:
        self._store = store
        self._outbound = outbound
        self._signer = signer
        self._compose = compose
        self._lease_s = timeout_s + 30
        self._sending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def delivering(self) -> AsyncIterator[None]:
        """Within the block messages are delivered; those under way at its end are sent again some time."""
        delivering = asyncio.create_task(self._deliver())
        try:
            yield
        finally:
            for task in (delivering, *self._sending):
                task.cancel()

    async def _deliver(self) -> None:
        while True:
            with suppress(RequestError):  # the database may be there again a moment later
                while len(self._sending) < AT_ONCE and (job := await self._next()):
                    sending = asyncio.create_task(self._send(job))
                    self._sending.add(sending)
                    sending.add_done_callback(self._sending.discard)
            await asyncio.sleep(LOOK_S)

    async def _next(self) -> Job | None:
        return await self._store.next_webhook(within_s=self._lease_s, most=TRIES)

    async def _send(self, job: Job) -> None:
        """Try once. A failure is anything but a 2xx."""
        try:
            message = await self._compose[job.api](job, int(time.time()), self._signer.sign)
            status = await self._outbound.post(job.webhook_url or "", message.body, message.headers)
            delivered, outcome = 200 <= status < 300, f"was answered with status {status}"
        except OutboundError as error:
            status, delivered, outcome = 0, False, error.problem
        except RequestError:
            return  # the database is away: it is tried again when the lease is over
        again = None
        if not delivered and status != GONE and job.webhook_attempts < TRIES:
            again = PAUSES_S[job.webhook_attempts - 1]
        metrics.WEBHOOKS.add(outcome="delivered" if delivered else "given_up" if again is None else "failed")
        if not delivered:
            # Its URL may hold a secret, so the log has none.
            then = "which was the last try" if again is None else f"and is tried again in {again} s"
            facts = {"event": "webhook", "job": job.id, "outcome": outcome}
            logger.warning("job %s: its webhook %s, %s", job.id, outcome, then, extra=facts)
        with suppress(RequestError):
            await self._store.note_webhook(job.id, again_in_s=again, delivered=delivered)
