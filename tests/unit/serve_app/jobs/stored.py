"""Jobs and their records for tests of the job store."""

from collections.abc import Callable, Mapping
from typing import Any

from serve_app.generation.delivery import ImageRecord
from serve_app.jobs.database import Database
from serve_app.jobs.records import StoredEncoding, StoredError, StoredRequest
from serve_app.jobs.store import JobProgress, JobStore
from serve_app.jobs.tables import Job, Owner

Open = Callable[[str], Database]

MODELS = {"m": "identity of m", "other": "identity of other"}
"""Identities of the models, by name."""
OWNER = Owner("k", "images")
ANOTHER = Owner("another", "images")
BROKEN = StoredError(status=500, code="broken", message="broken")
IMAGE = ImageRecord(name="b.png", bytes=1, width=512, height=512, seed=1, prompt="a boat")


def new_job(owner: Owner = OWNER, **fields: Any) -> Job:
    """Returns a job to submit. Fields that are missing have simple values."""
    request = StoredRequest(
        prompt="a boat", model="m", size=(512, 512), n=1, steps=2, guidance_scale=1.5, seed=1
    )
    defaults: dict[str, Any] = {
        **owner._asdict(),
        "fingerprint": "f",
        "model": "m",
        "request": request,
        "encoding": StoredEncoding(),
    }
    given = defaults | fields
    return Job(**{"identity": MODELS.get(given["model"])} | given)


async def submitted(store: JobStore, *, start_within_s: float | None = None, **fields: Any) -> Job:
    job, is_new = await store.submit(new_job(**fields), start_within_s)
    assert is_new
    return job


async def claimed(store: JobStore, worker: str = "w", models: Mapping[str, str] = MODELS) -> Job:
    job = await store.claim(worker, models)
    assert job
    return job


def no_news(job: Job) -> JobProgress:
    return JobProgress(id=job.id, progress=[None])
