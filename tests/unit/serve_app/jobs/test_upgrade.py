"""Jobs that version 0.1.0 has stored are shown and made by this version.

`v1/` holds the database and the files of that version, written over HTTP. `v1.json` has its own answers about
the finished jobs, and the requests to its stages for the queued ones. Its commit is a1fbf93.
"""

import asyncio
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from deployments.types import Event, ImageRequest, Pixels, PriorTokens, Progress
from serve_app.background import Periodic
from serve_app.config import AppConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound

V1 = Path(__file__).parent / "v1"
STORED: dict[str, Any] = json.loads((V1 / "v1.json").read_text())


class Idle:
    """A lifecycle without a cluster."""

    @property
    def reporting(self) -> list[Periodic]:
        return []


class Stages:
    """Stages that record what they are asked for, by request id."""

    def __init__(self) -> None:
        self.requests: dict[str, list[dict[str, Any]]] = defaultdict(list)

    async def prior(self, _: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        yield PriorTokens(target=np.zeros((16, 16), dtype=np.int64))

    async def decode(self, request: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        names = ("prompt", "width", "height", "seed", "steps", "guidance_scale", "strength", "previews")
        facts = {name: getattr(request, name) for name in (*names, "cfg_normalization")}
        sources = [hashlib.sha256(source.tobytes()).hexdigest() for source in request.sources]
        self.requests[request.request_id].append(facts | {"sources": sources})
        yield Progress(done=1, total=1, seconds=0)
        yield np.zeros((request.height, request.width, 3), dtype=np.uint8)


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def app(tmp_path: Path, stages: Stages) -> FastAPI:
    """The application on a copy of what version 0.1.0 has left."""
    shutil.copytree(V1, tmp_path / "v1")
    stage = {"device": "cpu", "dtype": "float32"}
    model = {
        "name": "glm-image",
        "family": "glm_image",
        "checkpoint": "tiny",
        "prior": stage,
        "decoder": stage,
    }
    config = AppConfig.model_validate(
        {
            "models": [model | {"defaults": {"width": 512, "height": 512, "steps": 3}}],
            "auth": {"open": True, "allowed_hosts": ["here"]},
            "storage": {"url": str(tmp_path / "v1/files"), "min_free_bytes": 0, "ttl_s": 20 * 365 * 86_400},
            "database": {"url": f"sqlite:///{tmp_path}/v1/v1.db"},
            "outbound": {"allow": ["127.0.0.1:9"]},
        }
    )
    files, outbound = FileStore(config.storage), Outbound(config.outbound)
    models = {"glm-image": Model(config=config.models[0], prior=stages.prior, decode=stages.decode)}
    generator = Generator(models, config.limits, SourceReader(outbound, files, config.limits))
    lifecycle: Any = Idle()
    return create_app(
        Services.of(config, generator, lifecycle, files, Database(config.database.url), outbound)
    )


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")


@pytest.mark.parametrize("finished", STORED["finished"].values(), ids=lambda one: str(one["url"]))
def test_a_finished_job_is_shown_as_before(app: FastAPI, finished: dict[str, Any]) -> None:
    async def main() -> None:
        async with client_of(app) as client:
            answer = await client.get(finished["url"])
            assert (answer.status_code, answer.json()) == (finished["status"], finished["answer"])

    asyncio.run(main())


def test_the_queued_jobs_are_made_with_what_was_asked_for(app: FastAPI, stages: Stages) -> None:
    queued = STORED["queued"]
    units = sum(len(facts["stages"]) for facts in queued.values())

    async def main() -> None:
        async with app.router.lifespan_context(app), asyncio.timeout(60):
            while sum(map(len, stages.requests.values())) < units:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.05)

    asyncio.run(main())
    asked = {job: sorted(units, key=lambda unit: unit["seed"]) for job, units in stages.requests.items()}
    assert asked == {job: facts["stages"] for job, facts in queued.items()}


def test_an_idempotency_key_still_names_its_job(app: FastAPI) -> None:
    async def main() -> None:
        async with client_of(app) as client:
            for job_id, asked in STORED["idempotent"].items():
                headers = {"Idempotency-Key": asked["key"]}
                again = await client.post("/v1/images/jobs", json=asked["body"], headers=headers)
                assert (again.status_code, again.json()["id"]) == (202, job_id), again.text
                assert again.headers["Idempotent-Replayed"] == "true"
                other = await client.post(
                    "/v1/images/jobs", json=asked["body"] | {"prompt": "another"}, headers=headers
                )
                assert other.status_code == 409

    asyncio.run(main())
