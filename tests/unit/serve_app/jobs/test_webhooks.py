"""Webhooks to a real server on this machine: signed, and tried until they are accepted, across restarts."""

import asyncio
import base64
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from serve_app.background import Background
from serve_app.config import Limits, OutboundConfig, StorageConfig
from serve_app.dialects.openai.jobs import API, compose
from serve_app.errors import Gone
from serve_app.files.store import FileStore
from serve_app.generation.delivery import Delivery
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.jobs import webhooks as webhooks_module
from serve_app.jobs.database import Database
from serve_app.jobs.signing import Signer
from serve_app.jobs.tables import Job, Owner
from serve_app.jobs.webhooks import Compose, Message, Sign, Webhooks
from serve_app.observability import metrics
from serve_app.outbound import Outbound
from tests.receiver import Receiver
from tests.unit.serve_app.jobs.server import FaultyStore
from tests.unit.serve_app.jobs.stored import Open, submitted

OWNER = Owner("k", API)


class Server:
    """The parts of a server that webhooks need.

    Args:
        database: keeps the jobs.
        folder: keeps the files.
        allow: hosts and ports that are not public, and may be called.
        faulty: see `FaultyStore`.
        error: raised for the first message; None for no error.
    """

    def __init__(
        self,
        database: Database,
        folder: str,
        allow: tuple[str, ...],
        faulty: str = "",
        error: Exception | None = None,
    ) -> None:
        outbound = Outbound(OutboundConfig(allow=allow, timeout_s=5))
        files = FileStore(StorageConfig(url=folder, min_free_bytes=0))
        generator = Generator({}, Limits(), SourceReader(outbound, files, Limits()))
        runner = SimpleNamespace(waits_for=lambda _: None)
        services: Any = SimpleNamespace(files=files, delivery=Delivery(generator, files), runner=runner)
        self.store = FaultyStore(database, max_jobs=9, ttl_s=100, faulty=faulty)
        self.signer = Signer(database)
        self.background = Background()
        message = failing_once(compose(services), error)
        self._webhooks = Webhooks(self.store, outbound, self.signer, {API: message}, 5)

    def delivering(self) -> Any:
        """Delivers webhooks within the block."""
        return self._webhooks.run_in_background(self.background)

    async def cancelled_job(self, url: str) -> Job:
        """Returns a job that has ended."""
        answer = {"base_url": "http://localhost", "quality": None, "response_format": None}
        job = await submitted(self.store, owner=OWNER, answer=answer, webhook_url=url)
        cancelled, _ = await self.store.cancel(OWNER, job.id)
        return cancelled

    async def until(self, job: Job, condition: Callable[[Job], object]) -> Job:
        """Returns the job when it meets the condition."""
        async with asyncio.timeout(20):
            while not condition(found := await self.store.get(OWNER, job.id)):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
        return found

    async def delivered(self, job: Job) -> Job:
        """Returns the job when its webhook was delivered."""
        return await self.until(job, lambda job: job.webhook_delivered_at)


def failing_once(make: Compose, error: Exception | None) -> Compose:
    """Returns a function that makes messages, except the first one if there is an error."""
    errors = [error] if error else []

    async def message(job: Job, timestamp: int, sign: Sign) -> Message:
        if errors:
            raise errors.pop()
        return await make(job, timestamp, sign)

    return message


Make = Callable[..., Server]


@pytest.fixture
def make(
    database_url: str,
    open_database: Open,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Makes servers that share a database, and may call the receiver."""
    monkeypatch.setattr(webhooks_module, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(webhooks_module, "PAUSES_S", (0.01,) * len(webhooks_module.PAUSES_S))

    def server(allow: tuple[str, ...] = (receiver.place,), **options: Any) -> Server:
        return Server(open_database(database_url), str(tmp_path), allow, **options)

    return server


def test_the_end_of_a_job_is_reported_with_a_signature_that_anyone_can_check(
    make: Make, receiver: Receiver
) -> None:
    async def main() -> None:
        server = make()
        async with server.delivering():
            job = await server.cancelled_job(receiver.url)
            await server.delivered(job)
        ((headers, body),) = receiver.came
        report = json.loads(body)
        assert report["type"] == "image.job.cancelled"
        assert (report["data"]["id"], report["data"]["status"]) == (job.id, "cancelled")
        assert headers["webhook-id"] == job.id
        assert headers["Content-Type"] == "application/json"
        (key,) = (await make().signer.jwks())["keys"]
        assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")
        public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
        version, _, signature = headers["webhook-signature"].partition(",")
        assert version == "v1a"
        signed = f"{job.id}.{headers['webhook-timestamp']}.".encode() + body
        public.verify(base64.b64decode(signature), signed)
        with pytest.raises(InvalidSignature):
            public.verify(base64.b64decode(signature), signed + b" ")

    asyncio.run(main())


def test_a_rejected_message_is_sent_again_with_the_same_id(make: Make, receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 302, 204]

    async def main() -> None:
        server = make()
        async with server.delivering():
            job = await server.delivered(await server.cancelled_job(receiver.url))
        assert [headers["webhook-id"] for headers, _ in receiver.came] == [job.id] * 4
        assert job.webhook_attempts == 4

    asyncio.run(main())


def test_a_restart_loses_no_webhook(make: Make, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.statuses = [500, 200]

    async def main() -> None:
        server = make()
        job = await server.cancelled_job(receiver.url)
        monkeypatch.setattr(webhooks_module, "PAUSES_S", (1,))
        async with server.delivering():
            # The lease lasts for more than thirty seconds, the pause after the failure for one.
            await server.until(
                job, lambda job: job.webhook_attempts and (job.webhook_at or 0) < time.time() + 2
            )
        later = make()
        async with later.delivering():
            await later.delivered(job)
        assert len(receiver.came) == 2

    asyncio.run(main())


def test_a_webhook_is_given_up_after_the_last_try(make: Make, receiver: Receiver) -> None:
    receiver.statuses = [500]

    async def main() -> None:
        server = make()
        async with server.delivering():
            job = await server.cancelled_job(receiver.url)
            await server.until(job, lambda job: job.webhook_at is None)
        assert len(receiver.came) == webhooks_module.MAX_TRIES == 10

    asyncio.run(main())


def test_a_receiver_that_answers_gone_is_not_called_again(
    make: Make, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [410]
    counted: list[str] = []
    monkeypatch.setattr(metrics.WEBHOOKS, "add", lambda *, outcome: counted.append(outcome))

    async def main() -> None:
        server = make()
        async with server.delivering():
            job = await server.cancelled_job(receiver.url)
            await server.until(job, lambda job: job.webhook_at is None)
        assert len(receiver.came) == 1
        assert counted == ["refused"]

    asyncio.run(main())


def test_an_address_that_is_not_public_is_never_called(make: Make, receiver: Receiver) -> None:
    async def main() -> None:
        server = make(allow=())
        async with server.delivering():
            job = await server.cancelled_job(receiver.url)
            await server.until(job, lambda job: job.webhook_attempts > 2)
        assert receiver.came == []

    asyncio.run(main())


def test_the_log_has_no_url_since_it_may_contain_a_secret(
    make: Make, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500, 200]

    async def main() -> None:
        server = make()
        async with server.delivering():
            job = await server.delivered(await server.cancelled_job(receiver.url))
        assert job.id in caplog.text
        assert "status 500" in caplog.text
        assert "token" not in caplog.text

    asyncio.run(main())


def test_two_servers_deliver_each_message_once(make: Make, receiver: Receiver) -> None:
    async def main() -> None:
        servers = [make(), make()]
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.delivering())
            jobs = [await servers[0].cancelled_job(receiver.url) for _ in range(5)]
            for job in jobs:
                await servers[1].delivered(job)
        assert sorted(headers["webhook-id"] for headers, _ in receiver.came) == sorted(job.id for job in jobs)

    asyncio.run(main())


def test_webhooks_are_delivered_after_an_unexpected_error(
    make: Make, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = make(faulty="next_webhook")
        async with server.delivering():
            await server.delivered(await server.cancelled_job(receiver.url))
        assert "deliver webhooks failed and is tried again" in caplog.text
        assert server.background.failing == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (RuntimeError("unexpected"), "its webhook's message cannot be made"),
        (Gone("The job's images were deleted.", code="result_gone"), "has no message (result_gone)"),
    ],
)
def test_a_message_that_cannot_be_made_is_tried_again(
    make: Make, receiver: Receiver, caplog: pytest.LogCaptureFixture, error: Exception, logged: str
) -> None:
    async def main() -> None:
        server = make(error=error)
        async with server.delivering():
            job = await server.delivered(await server.cancelled_job(receiver.url))
        assert job.webhook_attempts == 2
        assert len(receiver.came) == 1
        assert logged in caplog.text
        assert "is tried again in 0.01 s" in caplog.text

    asyncio.run(main())
