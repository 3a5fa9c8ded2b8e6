"""Queries of jobs, as SQLAlchemy expressions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, case, delete, func, literal, or_, select, tuple_, update
from sqlalchemy.orm import aliased, with_expression

from serve_app.errors import NotFound
from serve_app.jobs.database import now
from serve_app.jobs.records import UnreadableRecord
from serve_app.jobs.tables import Job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, Delete, Select, Update
    from sqlalchemy.orm import Session

    from serve_app.jobs.tables import Owner, State

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def jobs() -> Select[Job]:
    """Returns a query of jobs, with their positions."""
    other = aliased(Job)
    same_model = and_(other.model == Job.model, other.identity.is_not_distinct_from(Job.identity))
    turns = tuple_(other.priority, other.turn, other.seq) < tuple_(Job.priority, Job.turn, Job.seq)
    ahead = select(func.count(other.seq)).where(other.state == "queued", same_model, turns).scalar_subquery()
    position = case((Job.state == "queued", ahead), else_=literal(None))
    return select(Job).options(with_expression(Job.position, position))


def orphaned() -> ColumnElement[bool]:
    """Returns the condition that a job's worker has not renewed its lease in time."""
    return and_(Job.state == "running", Job.lease_until < now())


def overdue(ttl_s: float) -> ColumnElement[bool]:
    """Returns the condition that a queued job has waited too long for its start.

    Version 0.1.0 gives an interrupted job no new limit, so that one has `ttl_s` from its first start.
    """
    not_begun_again = or_(Job.started_at.is_(None), Job.started_at + ttl_s < now())
    return and_(Job.state == "queued", Job.start_by < now(), not_begun_again)


def made_by(models: Mapping[str, str]) -> ColumnElement[bool]:
    """Returns the condition for the jobs that these models can make.

    Args:
        models: identities of the models, by name.
    """
    of_older_servers = [(name, "") for name in models]
    return tuple_(Job.model, func.coalesce(Job.identity, "")).in_([*models.items(), *of_older_servers])


def end_jobs(ttl_s: float, state: State, **values: Any) -> Update:
    """Returns the update that ends jobs in a state; the caller adds the condition.

    Args:
        ttl_s: seconds for which they are kept.
        state: their state.
        values: further columns.
    """
    return update_jobs().values(
        state=state,
        worker=None,
        lease_until=None,
        ended_at=now(),
        expires_at=now() + ttl_s,
        webhook_at=case((Job.webhook_url.is_not(None), now())),
        version=Job.version + 1,
        **values,
    )


def back_in_queue(ttl_s: float) -> dict[str, Any]:
    """Returns the columns of a running job that goes back to its old place in the queue.

    Args:
        ttl_s: seconds within which it is to begin again.
    """
    return {
        "state": "queued",
        "start_by": now() + ttl_s,
        "worker": None,
        "lease_until": None,
        "progress": [],
        "version": Job.version + 1,
    }


def update_jobs(*which: ColumnElement[bool]) -> Update:
    """Returns an update of jobs. It does not change `Job` objects in memory; the caller loads them again."""
    return update(Job).where(*which).execution_options(synchronize_session=False)


def delete_jobs(which: ColumnElement[bool]) -> Delete:
    """Returns the deletion of jobs."""
    return delete(Job).where(which).execution_options(synchronize_session=False)


def first_job(session: Session, *which: ColumnElement[bool]) -> Job | None:
    """Returns the first job that fulfils the conditions; None if there is none."""
    return session.scalars(jobs().where(*which).execution_options(populate_existing=True)).first()


def one_job(session: Session, which: ColumnElement[bool]) -> Job:
    """Returns the only job that fulfils the condition."""
    return session.scalars(jobs().where(which).execution_options(populate_existing=True)).one()


def readable_jobs(session: Session, seqs: Sequence[int], query: Select[Job] | None = None) -> list[Job]:
    """Returns the jobs of these numbers in their order, without unreadable and deleted ones.

    Args:
        session: the session.
        seqs: the numbers.
        query: query of jobs; with their positions by default, which takes long for many.
    """
    query = jobs() if query is None else query
    try:
        found = {job.seq: job for job in session.scalars(query.where(Job.seq.in_(seqs)))}
    except UnreadableRecord:
        if len(seqs) == 1:
            return []
        middle = len(seqs) // 2
        return readable_jobs(session, seqs[:middle], query) + readable_jobs(session, seqs[middle:], query)
    return [found[seq] for seq in seqs if seq in found]


def owned_by(owner: Owner) -> ColumnElement[bool]:
    """Returns the condition for the jobs of an owner."""
    return and_(Job.key_id == owner.key_id, Job.api == owner.api)


def belongs_to(job_id: str, owner: Owner | None) -> ColumnElement[bool]:
    """Returns the condition for the job of this id, if it is this owner's, or whoever's if `owner` is None.

    Raises:
        NotFound: it is not a valid id. PostgreSQL rejects some strings.
    """
    if not ID.fullmatch(job_id):
        raise no_job()
    return and_(Job.id == job_id, owned_by(owner)) if owner else Job.id == job_id


def no_job() -> NotFound:
    """Returns the error for an unknown job."""
    return NotFound(
        "There is no such job. It may have expired, or belong to another API key or API.",
        code="job_not_found",
    )


def turn_of(session: Session, job: Job) -> float:
    """Returns the turn of a new job; see `JobStore.submit`."""
    same = and_(Job.identity.is_not_distinct_from(job.identity), Job.priority == job.priority)
    unfinished = Job.state.in_(("queued", "running"))
    after_mine = select(func.max(Job.turn + Job.work)).where(unfinished, same, Job.key_id == job.key_id)
    running = select(func.max(Job.turn)).where(Job.state == "running", same)
    queued = select(func.min(Job.turn)).where(Job.state == "queued", same)
    current = session.scalar(running)
    if current is None:
        current = session.scalar(queued)
    return max(session.scalar(after_mine) or 0, current or 0)
