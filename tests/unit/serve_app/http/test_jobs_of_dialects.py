"""Answers about jobs in the words of an API, over stand-ins."""

import asyncio
from typing import Any

import pytest

from serve_app.errors import Unavailable
from serve_app.http.application import create_app
from serve_app.jobs.tables import Owner
from serve_app.jobs.webhooks import MAX_TRIES
from tests.unit.serve_app.http.conftest import Call, MakeServices
from tests.unit.serve_app.jobs.stored import submitted


def test_pixazos_wait_answers_with_the_job_although_the_database_is_away(
    make_services: MakeServices, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = make_services()

    async def away(*_: object) -> Any:
        raise Unavailable("The database of jobs cannot be reached.")

    monkeypatch.setattr(services.jobs, "get", away)
    body = {"prompt": "a boat", "image_size": "square"}
    path = "/glm-image/v1/glm-image-request"
    answer = call(create_app(services), "POST", path, json=body, headers={"Prefer": "wait=20"})
    assert (answer.status_code, answer.json()["status"]) == (200, "QUEUED")


def test_a_webhook_is_given_up_after_its_last_try_and_not_during_it(
    make_services: MakeServices, call: Call
) -> None:
    services = make_services()
    app, store, owner = create_app(services), services.jobs, Owner("", "images")

    async def tried() -> str:
        job = await submitted(store, owner=owner, webhook_url="http://example.com/")
        await store.cancel(owner, job.id)
        for _ in range(MAX_TRIES - 1):
            assert await store.next_webhook(within_s=-1, max_tries=MAX_TRIES)
        assert await store.next_webhook(within_s=60, max_tries=MAX_TRIES)
        return job.id

    def state() -> str:
        return str(call(app, "GET", f"/v1/images/jobs/{job_id}").json()["webhook"]["state"])

    job_id = asyncio.run(tried())
    assert state() == "waiting"
    asyncio.run(store.note_webhook(job_id, again_in_s=None, delivered=False))
    assert state() == "given up"
