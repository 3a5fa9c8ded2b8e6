"""Records of jobs: their stored forms, which older and newer versions of the server share."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import (
    Busy,
    Conflict,
    Failed,
    Full,
    Gone,
    Invalid,
    InvalidParameter,
    NotFound,
    Refused,
    RequestError,
    TimedOut,
    TooLarge,
    Unavailable,
)
from serve_app.generation.request import Encoding, ResolvedRequest
from serve_app.jobs.database import Database
from serve_app.jobs.records import (
    LogLine,
    StoredEncoding,
    StoredError,
    StoredImage,
    StoredPreview,
    StoredProgress,
    StoredRequest,
)
from serve_app.jobs.store import JobProgress, JobStore
from serve_app.jobs.tables import Job
from tests.unit.serve_app.jobs.stored import IMAGE, OWNER, Open, claimed, new_job, submitted

REQUEST = ResolvedRequest(
    prompt="a boat",
    model="m",
    size=(512, 768),
    crop=(500, 700),
    n=2,
    steps=3,
    guidance_scale=2.5,
    negative_prompt="fog",
    cfg_normalization=True,
    strength=0.5,
    seed=2**63 - 1,
    partial_images=1,
    expand_prompt=True,
    moderation="low",
    blacken=True,
    encoding=Encoding("webp", 80),
)


@pytest.fixture
def database(database_url: str, open_database: Open) -> Database:
    return open_database(database_url)


async def stored_form(database: Database, column: str) -> Any:
    """Returns the JSON of a column of the only job."""
    query = sa.select(sa.column(column, sa.JSON)).select_from(sa.table("jobs"))
    return await database.read(lambda session: session.scalar(query))


async def job_with(database: Database, **columns: Any) -> Job:
    """Returns a job whose columns contain this JSON."""
    store = JobStore(database, max_jobs=9, ttl_s=100)
    job = await submitted(store)
    table = sa.table("jobs", *(sa.column(name, sa.JSON) for name in columns))
    await database.write(lambda session: session.execute(sa.update(table).values(columns)))
    return await store.get(OWNER, job.id)


def test_a_stored_request_makes_the_same_images(database: Database) -> None:
    async def main() -> None:
        store = JobStore(database, max_jobs=9, ttl_s=100)
        request = StoredRequest.of(REQUEST, "00-trace-span-01")
        encoding = StoredEncoding(format="webp", quality=80)
        job = await submitted(store, request=request, encoding=encoding)
        pixels = (np.zeros((8, 8, 3), dtype=np.uint8),)
        resolved = (await store.get(OWNER, job.id)).resolved(pixels)
        owned: dict[str, Any] = {
            "api": "images",
            "request_id": job.id,
            "key_id": "k",
        }
        assert resolved == replace(REQUEST, pixels=pixels, **owned)

    asyncio.run(main())


def test_the_records_of_a_running_job_are_read_as_written(database: Database) -> None:
    async def main() -> None:
        store = JobStore(database, max_jobs=9, ttl_s=100)
        await submitted(store)
        job = await claimed(store)
        news = JobProgress(
            id=job.id,
            progress=[None, StoredProgress(stage="decoder", done=1, total=2)],
            previews=[StoredPreview(image=1, index=0, name="p.png")],
            log=[LogLine(at=1.5, message="began")],
        )
        await store.renew("w", [news.id], [news])
        seen = await store.get(OWNER, job.id)
        assert (seen.progress, seen.previews, seen.log) == (news.progress, news.previews, news.log)
        assert await stored_form(database, "progress") == [None, {"stage": "decoder", "done": 1, "total": 2}]
        assert seen.files == ["p.png"]

    asyncio.run(main())


@pytest.mark.parametrize("risk", [None, 0.25])
def test_images_are_stored_under_their_old_names(database: Database, risk: float | None) -> None:
    async def main() -> None:
        store = JobStore(database, max_jobs=9, ttl_s=100)
        image = replace(IMAGE, risk=risk, generated_tokens=320)
        await submitted(store)
        job = await claimed(store)
        assert await store.finish("w", JobProgress(id=job.id), "succeeded", images=[image])
        (stored,) = await stored_form(database, "images")
        assert (stored["unsafety"], stored["drawn_tokens"]) == (risk, 320)
        assert not {"risk", "generated_tokens"} & set(stored)
        assert (await store.get(OWNER, job.id)).images == [image]

    asyncio.run(main())


def test_records_of_other_versions_are_read(database: Database) -> None:
    async def main() -> None:
        request = new_job().request.model_dump(mode="json")
        job = await job_with(
            database,
            request=request | {"of_a_newer_version": 1},
            images=[{"name": "b.png", "bytes": 1, "width": 2, "height": 3, "seed": 4, "new": 5}],
        )
        assert job.request == new_job().request
        (image,) = job.images
        assert (image.name, image.seed, image.risk, image.prompt) == ("b.png", 4, None, "")

    asyncio.run(main())


KINDS = [Invalid, NotFound, Conflict, Gone, Busy, Failed, Unavailable, TimedOut, Full]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_error_keeps_its_kind_and_is_final(database: Database, kind: type[RequestError]) -> None:
    async def main() -> None:
        error = kind("No boat.", code="no_boat", param="prompt", retryable=True)
        store = JobStore(database, max_jobs=9, ttl_s=100)
        await submitted(store)
        job = await claimed(store)
        await store.finish("w", JobProgress(id=job.id), "failed", error=StoredError.of(error))
        stored = (await store.get(OWNER, job.id)).error
        assert stored == StoredError.of(error)
        assert type(stored.as_error()) is kind
        assert vars(stored.as_error()) == vars(error) | {"retryable": False}

    asyncio.run(main())


def test_an_error_of_a_parameter_keeps_its_problem() -> None:
    error = InvalidParameter("size", "must be smaller", code="too_many")
    read = StoredError.model_validate(StoredError.of(error).model_dump(mode="json")).as_error()
    assert isinstance(read, InvalidParameter)
    assert vars(read) == vars(error)
    assert read.for_api({"size": "image_size"}).message == "image_size must be smaller."


@pytest.mark.parametrize(("error", "status"), [(TooLarge("It is large."), 400), (Refused("No."), 500)])
def test_kinds_without_a_number_are_stored_as_similar_ones(error: RequestError, status: int) -> None:
    stored = StoredError.of(error)
    assert (stored.status, stored.code, stored.message) == (status, error.code, error.message)


@pytest.mark.parametrize(
    ("stored", "kind", "is_fault"),
    [
        ({"status": 400, "message": "No boat."}, Invalid, False),
        ({"status": 404, "message": "No boat."}, NotFound, False),
        ({"status": 410, "message": "No boat."}, Gone, False),
        ({"status": 503, "message": "No boat."}, Unavailable, True),
        ({"status": 504, "message": "No boat."}, TimedOut, True),
        ({"status": 599, "message": "No boat."}, Failed, True),
    ],
)
def test_an_error_of_version_1_is_read(
    database: Database, stored: dict[str, Any], kind: type[RequestError], is_fault: bool
) -> None:
    async def main() -> None:
        job = await job_with(database, error=stored | {"code": "no_boat", "param": None})
        assert job.error
        assert job.error.is_fault == is_fault
        error = job.error.as_error()
        assert type(error) is kind
        assert (error.message, error.code, error.param) == ("No boat.", "no_boat", None)
        assert not error.retryable

    asyncio.run(main())


def test_an_error_of_a_parameter_of_version_1_is_read(database: Database) -> None:
    async def main() -> None:
        stored = {"status": 400, "code": "too_long", "param": "prompt", "problem": "is too long"}
        job = await job_with(database, error=stored)
        assert job.error
        error = job.error.as_error()
        assert isinstance(error, InvalidParameter)
        assert (error.message, error.code, error.param) == ("prompt is too long.", "too_long", "prompt")
        assert not error.retryable

    asyncio.run(main())


@pytest.mark.parametrize("kind", [StoredRequest, StoredError, StoredProgress, StoredImage])
def test_a_record_of_another_version_is_an_error(kind: Any) -> None:
    with pytest.raises(ValidationError, match="version"):
        TypeAdapter(kind).validate_python({"version": 2, "name": "a", "bytes": 1, "width": 1, "height": 1})


def test_the_version_of_a_record_is_not_written() -> None:
    """Servers of version 0.1.0 read only the keys that they know."""
    assert "version" not in StoredProgress(stage="prior", done=1, total=2).model_dump()
