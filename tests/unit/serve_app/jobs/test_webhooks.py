"""Webhooks, to a real server on this machine: signed, sent until they are taken, across restarts."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from serve_app.config import Limits, OutboundConfig, StorageConfig
from serve_app.dialects.openai.jobs import API, Views
from serve_app.files.store import FileStore
from serve_app.generation.delivery import Delivery
from serve_app.generation.generator import Generator
from serve_app.http.links import Links
from serve_app.jobs import webhooks as webhooks_module
from serve_app.jobs.database import Database
from serve_app.jobs.signing import Signer
from serve_app.jobs.store import Job, JobStore, NewJob, Owner
from serve_app.jobs.webhooks import Webhooks
from serve_app.outbound import Outbound
from tests.receiver import Receiver

OWNER = Owner("k", API)


class Setup:
    def __init__(self, database: Database, folder: str, allow: tuple[str, ...]) -> None:
        files = FileStore(StorageConfig(url=folder, min_free_bytes=0))
        links = Links(files, None)
        views = Views(Delivery(Generator({}, Limits()), files, links), links)
        self.store = JobStore(database, max_jobs=9, ttl_s=100)
        self.signer = Signer(database)
        outbound = Outbound(OutboundConfig(allow=allow, timeout_s=5))
        self.webhooks = Webhooks(self.store, outbound, self.signer, {API: views.message}, 5)

    async def cancelled_job(self, url: str) -> Job:
        """A job that has ended."""
        request = {"model": "m", "prompt": "a boat", "size": [512, 512], "n": 1, "seed": 1}
        answer = {"base_url": "http://here", "quality": None, "response_format": None}
        new = NewJob(owner=OWNER, fingerprint="f", model="m", request=request, answer=answer, webhook_url=url)
        job, _ = await self.store.submit(new)
        return await self.store.cancel(OWNER, job.id)

    async def until(self, job: Job, condition: Callable[[Any], object]) -> None:
        async with asyncio.timeout(20):
            while not condition(await self.store.get(OWNER, job.id)):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)


Make = Callable[..., Setup]


@pytest.fixture
def make(
    database_url: str,
    open_database: Callable[[str], Database],
    receiver: Receiver,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    monkeypatch.setattr(webhooks_module, "LOOK_S", 0.02)
    monkeypatch.setattr(webhooks_module, "PAUSES_S", (0.01,) * len(webhooks_module.PAUSES_S))
    return lambda allow=(receiver.place,): Setup(open_database(database_url), str(tmp_path), allow)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def test_the_end_of_a_job_is_told_signed_so_that_anybody_can_check(make: Make, receiver: Receiver) -> None:
    async def main() -> None:
        setup = make()
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_delivered_at)
        ((headers, body),) = receiver.came
        told = json.loads(body)
        assert told["type"] == "image.job.cancelled"
        assert (told["data"]["id"], told["data"]["status"]) == (job.id, "cancelled")
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

    run(main())


def test_what_is_not_taken_comes_again_with_the_same_id(make: Make, receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 302, 204]

    async def main() -> None:
        setup = make()
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_delivered_at)
        assert [headers["webhook-id"] for headers, _ in receiver.came] == [job.id] * 4
        assert (await setup.store.get(OWNER, job.id)).webhook_attempts == 4

    run(main())


def test_a_restart_forgets_no_webhook(
    make: Make, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [500, 200]

    async def main() -> None:
        setup = make()
        job = await setup.cancelled_job(receiver.url)
        monkeypatch.setattr(webhooks_module, "PAUSES_S", (1,))
        async with setup.webhooks.delivering():
            # The lease is over thirty seconds long, the pause that follows the failure a second.
            await setup.until(job, lambda job: job.webhook_attempts and job.webhook_at < time.time() + 2)
        later = make()
        async with later.webhooks.delivering():
            await later.until(job, lambda job: job.webhook_delivered_at)
        assert len(receiver.came) == 2

    run(main())


def test_after_the_last_try_it_is_given_up(make: Make, receiver: Receiver) -> None:
    receiver.statuses = [500]

    async def main() -> None:
        setup = make()
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_at is None)
        assert len(receiver.came) == webhooks_module.TRIES == 10

    run(main())


def test_who_says_gone_is_not_asked_again(make: Make, receiver: Receiver) -> None:
    receiver.statuses = [410]

    async def main() -> None:
        setup = make()
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_at is None)
        assert len(receiver.came) == 1

    run(main())


def test_a_place_that_is_not_public_is_never_told(make: Make, receiver: Receiver) -> None:
    async def main() -> None:
        setup = make(allow=())
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_attempts > 2)
        assert receiver.came == []

    run(main())


def test_the_log_has_no_url_which_may_hold_a_secret(
    make: Make, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500, 200]

    async def main() -> None:
        setup = make()
        async with setup.webhooks.delivering():
            job = await setup.cancelled_job(receiver.url)
            await setup.until(job, lambda job: job.webhook_delivered_at)
        assert job.id in caplog.text
        assert "status 500" in caplog.text
        assert "token" not in caplog.text

    run(main())


def test_two_servers_tell_it_once(make: Make, receiver: Receiver) -> None:
    async def main() -> None:
        setups = [make(), make()]
        async with AsyncExitStack() as stack:
            for setup in setups:
                await stack.enter_async_context(setup.webhooks.delivering())
            found = [await setups[0].cancelled_job(receiver.url) for _ in range(5)]
            for job in found:
                await setups[1].until(job, lambda job: job.webhook_delivered_at)
        assert sorted(headers["webhook-id"] for headers, _ in receiver.came) == sorted(
            job.id for job in found
        )

    run(main())
