"""Reports on the jobs of all owners, for the operator."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import JSON, select, type_coerce

from serve_app.jobs.database import now
from serve_app.jobs.queries import readable_jobs
from serve_app.jobs.tables import Job
from serve_app.observability.recent import DAY_S, DAYS, Work, WorkByDay, day_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from serve_app.jobs.database import Database

MAX_AGE_S = 60.0


async def unfinished(database: Database) -> list[Job]:
    """Returns the readable jobs that have not ended, in the order of submission, without positions."""

    def call(session: Session) -> list[Job]:
        ours = select(Job.seq).where(Job.state.in_(("queued", "running"))).order_by(Job.seq)
        return readable_jobs(session, list(session.scalars(ours)), select(Job))

    return await database.read(call)


class WorkOfJobs:
    """The work of the jobs that have succeeded in the last days, and that are still kept.

    Args:
        database: the database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._read_at = float("-inf")
        self._found: WorkByDay = {}

    async def by_day(self) -> WorkByDay:
        """Returns the work, at most `MAX_AGE_S` old: reading it takes long if many jobs are kept."""
        if time.monotonic() - self._read_at > MAX_AGE_S:
            self._found = await self._database.read(_work_by_day)
            self._read_at = time.monotonic()
        return self._found


def _work_by_day(session: Session) -> WorkByDay:
    images = type_coerce(Job.request, JSON)["n"].as_integer()
    ended = select(Job.ended_at, Job.key_id, images, Job.work).where(
        Job.state == "succeeded", Job.ended_at > now() - DAYS * DAY_S
    )
    found: WorkByDay = {}
    for ended_at, key_id, count, megapixel_steps in session.execute(ended):
        found.setdefault((day_of(ended_at), key_id), Work()).add(count, megapixel_steps)
    return found
