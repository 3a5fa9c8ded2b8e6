"""Webhooks: calls to the URLs of ended jobs. A failed call is repeated, up to ten tries in all.

The status 410 ends the tries. A receiver may get the same call twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.observability.log import FAULT
from serve_app.background import Periodic
from serve_app.errors import RequestError, Unavailable
from serve_app.jobs.tables import Job
from serve_app.observability import metrics
from serve_app.outbound import OutboundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from serve_app.background import Background
    from serve_app.jobs.signing import Signer
    from serve_app.jobs.store import JobStore
    from serve_app.outbound import Outbound

logger = logging.getLogger("ray.serve")

PAUSES_S = (5, 15, 60, 120, 300, 600, 1200, 1800, 3600)
"""Seconds between a failed try and the next one. The last try comes some two hours after the first."""
MAX_TRIES = len(PAUSES_S) + 1
MAX_CONCURRENCY = 16
POLL_INTERVAL_S = 1.0
GONE = 410
"""Status by which a receiver asks for no further tries."""


@dataclass(frozen=True)
class Message:
    """The body and the headers of a call."""

    body: bytes
    headers: Mapping[str, str]


Sign = Callable[[bytes], Awaitable[bytes]]
Compose = Callable[[Job, int, Sign], Awaitable[Message]]
"""Makes the message of an ended job; gets the job, the time in seconds since 1970, and a function that
signs."""


class Webhooks:
    """Delivers due messages. Their state is in the jobs, so that a restart loses nothing.

    Args:
        store: keeps the jobs.
        outbound: sends the messages.
        signer: signs the messages.
        compose: makes the messages, by the `api` of the jobs.
        timeout_s: seconds that one try may take.
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
    async def run_in_background(self, background: Background) -> AsyncIterator[None]:
        """Delivers messages within the block. Unfinished deliveries are repeated after a restart."""
        deliver = Periodic(
            name="deliver webhooks", run=self._begin, interval_s=POLL_INTERVAL_S, expected=(Unavailable,)
        )
        try:
            async with background.run([deliver]):
                yield
        finally:
            for task in self._sending:
                task.cancel()

    async def _begin(self) -> None:
        """Begins the deliveries that are due."""
        while len(self._sending) < MAX_CONCURRENCY and (job := await self._next()):
            sending = asyncio.create_task(self._send(job))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _next(self) -> Job | None:
        return await self._store.next_webhook(within_s=self._lease_s, max_tries=MAX_TRIES)

    async def _send(self, job: Job) -> None:
        """Tries once. Any status but a 2xx is a failure."""
        try:
            message = await self._compose[job.api](job, int(time.time()), self._signer.sign)
            status = await self._outbound.post(job.webhook_url or "", message.body, message.headers)
            delivered, outcome = 200 <= status < 300, f"was answered with status {status}"
        except OutboundError as error:
            status, delivered, outcome = 0, False, error.problem
        except Unavailable:
            return  # the database is away: the next try, if there is one, comes when the lease expires
        except RequestError as error:
            status, delivered, outcome = 0, False, f"has no message ({error.code})"
        except Exception:
            logger.exception("job %s: its webhook's message cannot be made", job.id, extra=FAULT)
            status, delivered, outcome = 0, False, "has no message"
        again = None
        if not delivered and status != GONE and job.webhook_attempts < MAX_TRIES:
            again = PAUSES_S[job.webhook_attempts - 1]
        counted = "failed" if again else "refused" if status == GONE else "given_up"
        metrics.WEBHOOKS.add(outcome="delivered" if delivered else counted)
        if not delivered:
            # The log does not hold the URL, which may contain a secret.
            then = "which was the last try" if again is None else f"and is tried again in {again} s"
            facts = {"event": "webhook", "job": job.id, "outcome": outcome}
            logger.warning("job %s: its webhook %s, %s", job.id, outcome, then, extra=facts)
        with suppress(RequestError):
            await self._store.note_webhook(job.id, again_in_s=again, delivered=delivered)
