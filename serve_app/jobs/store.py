"""The job store: jobs in the database until they have ended, and for a while after.

A job is queued, then running, then succeeded, failed or cancelled. Its runner holds a lease and renews it.
When the lease runs out, another runner may take the job. Every step is one transaction that takes effect only
if the job is still where it was. So a job ends exactly once, whatever dies when.

The module is long because the steps belong together: each relies on the conditions of the others.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import and_, func, or_, select

from deployments.observability.log import FAULT
from serve_app.errors import Busy, Conflict, Failed, TimedOut
from serve_app.jobs.database import now
from serve_app.jobs.queries import (
    back_in_queue,
    belongs_to,
    delete_jobs,
    end_jobs,
    first_job,
    made_by,
    no_job,
    one_job,
    orphaned,
    overdue,
    owned_by,
    readable_jobs,
    turn_of,
    update_jobs,
)
from serve_app.jobs.records import StoredError, UnreadableRecord
from serve_app.jobs.tables import Job

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from serve_app.generation.delivery import ImageRecord
    from serve_app.jobs.database import Database
    from serve_app.jobs.records import LogLine, StoredPreview, StoredProgress
    from serve_app.jobs.tables import Owner, Priority, State

logger = logging.getLogger("ray.serve")

LEASE_S = 15
"""Seconds without a renewal after which another runner may take a job."""
MAX_ATTEMPTS = 5
"""Most times that a job is begun. A job whose runners keep dying is given up."""
ABANDONED_S = 600.0
"""Seconds after the end of its lease from which a job of another model counts as abandoned.

After an outage of the database, its own server may renew the lease later than another server looks.
"""
EXPIRED_AT_A_TIME = 200
READ_AT_A_TIME = 500
POLL_INTERVAL_S = 1.0


class Counts(NamedTuple):
    """Numbers of jobs that have not ended.

    Attributes:
        queued: jobs that wait.
        running: jobs that run.
        oldest_s: age of the oldest job that waits, in seconds; 0 if none waits.
        foreign: numbers of those that wait for a model that the caller lacks, by the model's identity, or by
            its name for jobs of older servers.
    """

    queued: int
    running: int
    oldest_s: float
    foreign: Mapping[str, int]


@dataclass(kw_only=True)
class JobProgress:
    """The news of a running job; see `Job` for the attributes."""

    id: str
    progress: list[StoredProgress | None] = field(default_factory=list)
    previews: list[StoredPreview] = field(default_factory=list)
    log: list[LogLine] = field(default_factory=list)


class JobStore:
    """Keeps the jobs.

    Args:
        database: the database.
        max_jobs: most jobs that have not ended.
        ttl_s: seconds for which an ended job is kept. A job that has not begun after this time fails.
    """

    def __init__(self, database: Database, *, max_jobs: int, ttl_s: float) -> None:
        self._database = database
        self._max_jobs = max_jobs
        self._ttl_s = ttl_s
        self._watched: dict[str, asyncio.Event] = {}
        self._is_watched = True

    async def submit(self, job: Job, start_within_s: float | None = None) -> tuple[Job, bool]:
        """Enqueues a job.

        A job's turn comes after the unfinished work of its own key. The work of other keys does not delay it.
        So two keys with waiting jobs get the same amount of work done. The jobs of one key keep their order.
        This is start-time fair queueing (Goyal, Vin and Cheng, 1996), for each model and priority.

        Args:
            job: the new job.
            start_within_s: seconds after which it fails if it has not begun; None for `ttl_s`.

        Returns:
            The job, and whether it is new. With a known idempotency key, it is the job of that key.

        Raises:
            Conflict: the idempotency key was used for another request.
            Busy: there are too many jobs.
        """

        def call(session: Session) -> tuple[Job, bool]:
            self._database.one_at_a_time(session)
            if known := self._known(session, job):
                return known, False
            self._check_room(session)
            job.start_by = now() + min(start_within_s or self._ttl_s, self._ttl_s)
            job.turn = turn_of(session, job)
            session.add(job)
            session.flush()
            return one_job(session, Job.id == job.id), True

        return await self._database.write(call)

    async def known(self, job: Job) -> Job | None:
        """Returns the job that has the new job's idempotency key already.

        Raises:
            Conflict: that job is of another request.
        """
        return await self._database.read(lambda session: self._known(session, job))

    def _known(self, session: Session, new: Job) -> Job | None:
        if new.idempotency_key is None:
            return None
        job = first_job(session, Job.key_id == new.key_id, Job.idempotency_key == new.idempotency_key)
        if job and job.fingerprint != new.fingerprint:
            raise Conflict(
                "This Idempotency-Key was used for another request; use a new one for each.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return job

    async def check_room(self) -> None:
        """Checks that there may be one more job.

        Raises:
            Busy: there are too many.
        """
        await self._database.read(self._check_room)

    def _check_room(self, session: Session) -> None:
        unfinished = select(func.count(Job.seq)).where(Job.state.in_(("queued", "running")))
        if (session.scalar(unfinished) or 0) >= self._max_jobs:
            raise Busy(
                f"The server has {self._max_jobs} jobs that have not ended, which is its limit; try again "
                "later, or cancel some.",
                code="too_many_jobs",
                retry_after_s=30,
            )

    async def get(self, owner: Owner, job_id: str) -> Job:
        """Returns a job.

        Raises:
            NotFound: the owner has no such job.
        """
        mine = belongs_to(job_id, owner)
        job = await self._database.read(lambda session: first_job(session, mine))
        if job is None:
            raise no_job()
        return job

    async def watch(self, owner: Owner, job_id: str, seen: str = "") -> AsyncGenerator[Job, None]:
        """Yields a job at every change, until it has ended or the server stops.

        Args:
            owner: the owner.
            job_id: id of the job.
            seen: the `mark` of the last change that the caller knows.

        Raises:
            NotFound: the owner has no such job.
        """
        try:
            while True:
                change = self._watched.setdefault(job_id, asyncio.Event())
                job = await self.get(owner, job_id)
                if job.mark != seen:
                    seen = job.mark
                    yield job
                if job.has_ended or not self._is_watched:
                    return
                with suppress(TimeoutError):  # other servers change the job too, and its position
                    async with asyncio.timeout(POLL_INTERVAL_S):
                        await change.wait()
        finally:
            self._notify(job_id)  # other watchers of the job wait for a new event

    def stop_watching(self) -> None:
        """Ends all `watch` calls, since the server stops only when all requests have ended."""
        self._is_watched = False
        self._notify(*self._watched)

    def _notify(self, *job_ids: str) -> None:
        """Wakes those who watch these jobs."""
        for job_id in job_ids:
            if change := self._watched.pop(job_id, None):
                change.set()

    async def page(
        self, owner: Owner, *, limit: int, after: str | None = None, state: State | None = None
    ) -> list[Job]:
        """Returns jobs, the newest first: those submitted before `after`. Unreadable ones are left out.

        Raises:
            NotFound: there is no `after`.
        """

        def call(session: Session) -> list[Job]:
            wanted = [owned_by(owner)]
            if state:
                wanted.append(Job.state == state)
            if after is not None:
                last = first_job(session, belongs_to(after, owner))
                if last is None:
                    raise no_job()
                wanted.append(Job.seq < last.seq)
            newest_first = select(Job.seq).where(*wanted).order_by(Job.seq.desc())
            found: list[Job] = []
            while seqs := list(session.scalars(newest_first.limit(limit - len(found)))):
                found += readable_jobs(session, seqs)
                newest_first = newest_first.where(Job.seq < seqs[-1])
            return found

        return await self._database.read(call)

    async def succeeded(self) -> AsyncGenerator[Job, None]:
        """Yields the jobs of all owners that have succeeded, the newest first, without unreadable ones."""
        newest_first = select(Job.seq).where(Job.state == "succeeded").order_by(Job.seq.desc())
        while True:

            def call(session: Session, following: Select[int] = newest_first) -> tuple[list[int], list[Job]]:
                seqs = list(session.scalars(following.limit(READ_AT_A_TIME)))
                return seqs, readable_jobs(session, seqs)

            seqs, found = await self._database.read(call)
            for job in found:
                yield job
            if not seqs:
                return
            newest_first = newest_first.where(Job.seq < seqs[-1])

    async def cancel(self, owner: Owner | None, job_id: str) -> tuple[Job, bool]:
        """Cancels a job: a queued one at once, a running one when its runner learns of it.

        Args:
            owner: its owner; None for an operator, who may cancel any job.
            job_id: its id.

        Returns:
            The job, and whether this call has ended it.

        Raises:
            NotFound: the owner has no such job.
            Conflict: the job has succeeded or failed.
        """

        def call(session: Session) -> tuple[Job, bool]:
            mine = belongs_to(job_id, owner)
            # The row is locked: otherwise the job could be queued again between the two updates.
            session.scalar(select(Job.seq).where(mine).with_for_update())
            ending = end_jobs(self._ttl_s, "cancelled").where(mine, Job.state == "queued")
            has_ended = session.scalar(ending.returning(Job.id)) is not None
            running = update_jobs(mine, Job.state == "running")
            session.execute(running.values(cancelling=True, version=Job.version + 1))
            job = first_job(session, mine)
            if job is None:
                raise no_job()
            if job.state in ("succeeded", "failed"):
                raise Conflict(
                    f"The job has {job.state} already, and cannot be cancelled.", code="job_has_ended"
                )
            return job, has_ended

        cancelled = await self._database.write(call)
        self._notify(job_id)
        return cancelled

    async def prioritize(self, job_id: str, priority: Priority) -> Job:
        """Changes the priority of a queued job, whoever's it is. It gets the turn of a new job there.

        Raises:
            NotFound: there is no such job.
            Conflict: the job is not queued.
        """

        def call(session: Session) -> Job:
            self._database.one_at_a_time(session)
            which = belongs_to(job_id, None)
            session.scalar(select(Job.seq).where(which).with_for_update())
            job = first_job(session, which)
            if job is None:
                raise no_job()
            if job.state != "queued":
                raise Conflict(
                    f"Only a queued job can get another priority, and the state of this one is {job.state}.",
                    code="job_is_not_queued",
                )
            if job.priority != priority:
                with session.no_autoflush:  # the job does not count among those before it
                    job.priority = priority
                    job.turn = turn_of(session, job)
                job.version += 1
                session.flush()
            return one_job(session, which)

        changed = await self._database.write(call)
        self._notify(job_id)
        return changed

    async def purge(self, owner: Owner, job_id: str) -> Job:
        """Deletes an ended job; returns it. Its webhook is not called any more.

        Raises:
            NotFound: the owner has no such job.
            Conflict: the job has not ended.
        """

        def call(session: Session) -> Job:
            job = first_job(session, belongs_to(job_id, owner))
            if job is None:
                raise no_job()
            if not job.has_ended:
                raise Conflict(f"The job is {job.state}; cancel it first.", code="job_has_not_ended")
            session.execute(delete_jobs(Job.seq == job.seq))
            return job

        return await self._database.write(call)

    async def claim(
        self,
        worker: str,
        models: Mapping[str, str],
        active: Collection[str] = (),
        without_keys: Collection[str] = (),
    ) -> Job | None:
        """Begins the next job that these models can make; the worker holds its lease from now on.

        Args:
            worker: id of the worker.
            models: identities of the models, by name.
            active: ids of the jobs that the worker runs. It begins none of them again, even if it has lost
                one and does not know it yet.
            without_keys: ids of the keys whose jobs are left out.
        """

        def call(session: Session) -> Job | None:
            following = (
                select(Job.seq)
                .where(
                    or_(Job.state == "queued", orphaned()),
                    Job.id.not_in(active),
                    made_by(models),
                    Job.key_id.not_in(without_keys),
                    ~Job.cancelling,
                    Job.attempts < MAX_ATTEMPTS,
                )
                .where(~overdue(self._ttl_s))
                .order_by(Job.priority, Job.turn, Job.seq)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            while (seq := session.scalar(following)) is not None:
                session.execute(
                    update_jobs(Job.seq == seq).values(
                        state="running",
                        worker=worker,
                        lease_until=now() + LEASE_S,
                        attempts=Job.attempts + 1,
                        started_at=func.coalesce(Job.started_at, now()),
                        version=Job.version + 1,
                    )
                )
                try:
                    return one_job(session, Job.seq == seq)
                except UnreadableRecord as error:
                    ending = end_jobs(self._ttl_s, "failed", error=StoredError.of(error)).where(
                        Job.seq == seq
                    )
                    job_id = session.scalar(ending.returning(Job.id))
                    facts = FAULT | {"job": job_id}
                    logger.error("job %s cannot be read and fails: %s", job_id, error.problem, extra=facts)  # noqa: TRY400
            return None

        if job := await self._database.write(call):
            self._notify(job.id)
        return job

    async def renew(
        self, worker: str, active: Collection[str], news: Collection[JobProgress] = ()
    ) -> set[str]:
        """Renews a worker's leases and stores the news of its jobs.

        Args:
            worker: id of the worker.
            active: ids of the jobs that it runs.
            news: their news since the last call.

        Returns:
            The ids of those that are still the worker's and not cancelled.
        """

        def call(session: Session) -> set[str]:
            ours = and_(Job.worker == worker, Job.state == "running", Job.id.in_(active))
            session.execute(update_jobs(ours).values(lease_until=now() + LEASE_S))
            for one in news:
                session.execute(
                    update_jobs(ours, Job.id == one.id).values(
                        progress=one.progress, previews=one.previews, log=one.log, version=Job.version + 1
                    )
                )
            return set(session.scalars(select(Job.id).where(ours, ~Job.cancelling)))

        mine = await self._database.write(call)
        self._notify(*(one.id for one in news))
        return mine

    async def finish(
        self,
        worker: str,
        news: JobProgress,
        state: State,
        *,
        images: Sequence[ImageRecord] = (),
        error: StoredError | None = None,
    ) -> bool:
        """Ends a job of a worker. It ends as cancelled if and only if its owner asked for that.

        After `Unavailable`, the job may have ended all the same. The same call tells.

        Returns:
            Whether it has ended so. If not, it is another worker's by now, or it is to be cancelled.
        """

        def call(session: Session) -> bool:
            ours = and_(Job.id == news.id, Job.worker == worker, Job.state == "running")
            ours = and_(ours, Job.cancelling if state == "cancelled" else ~Job.cancelling)
            ending = end_jobs(self._ttl_s, state, images=list(images), error=error, log=news.log)
            if session.scalar(ending.where(ours).returning(Job.id)):
                return True
            job = first_job(session, Job.id == news.id)
            return job is not None and job.state == state and job.log == news.log  # by an earlier call

        done = await self._database.write(call)
        self._notify(news.id)
        return done

    async def release(self, worker: str) -> None:
        """Puts a worker's jobs back into the queue, to their old places."""

        def call(session: Session) -> None:
            session.execute(
                update_jobs(Job.worker == worker, Job.state == "running", ~Job.cancelling).values(
                    **back_in_queue(self._ttl_s), attempts=Job.attempts - 1
                )
            )

        await self._database.write(call)

    async def end_overdue(self, models: Mapping[str, str], active: Collection[str] = ()) -> list[Job]:
        """Ends jobs that no runner will end: too late to start, cancelled without a runner, begun too often.

        Jobs of other models whose runner has died go back into the queue after a while. Otherwise they would
        stay `running` if no server had their model any more.

        Args:
            models: identities of the caller's models, by name. Servers with a job's model claim it.
            active: ids of the jobs that the caller runs. It ends them itself.

        Returns:
            The jobs that it has ended, without unreadable ones.
        """
        late = TimedOut(
            "The job was not begun, or after an interruption not begun again, within its time limit; submit "
            "it again.",
            code="start_timeout",
        )
        hopeless = Failed(
            f"The job was interrupted {MAX_ATTEMPTS} times and was given up; the server's log says why.",
            code="interrupted",
        )

        def call(session: Session) -> list[Job]:
            left = and_(orphaned(), Job.id.not_in(active))
            abandoned = and_(left, ~made_by(models), Job.lease_until + ABANDONED_S < now())
            to_repeat = and_(abandoned, ~Job.cancelling, Job.attempts < MAX_ATTEMPTS)
            session.execute(update_jobs(to_repeat).values(back_in_queue(self._ttl_s)))
            ended: list[int] = []
            for ending, which in (
                (
                    end_jobs(self._ttl_s, "failed", error=StoredError.of(late)),
                    overdue(self._ttl_s),
                ),
                (end_jobs(self._ttl_s, "cancelled"), and_(left, Job.cancelling)),
                (
                    end_jobs(self._ttl_s, "failed", error=StoredError.of(hopeless)),
                    and_(left, Job.attempts >= MAX_ATTEMPTS),
                ),
            ):
                ended += session.scalars(ending.where(which).returning(Job.seq))
            return readable_jobs(session, ended)

        ended = await self._database.write(call)
        self._notify(*(job.id for job in ended))
        return ended

    async def delete_expired(self) -> list[Job]:
        """Deletes some of the jobs that have expired; returns them, without unreadable ones.

        The file store deletes the files of unreadable jobs when they are too old.
        """

        def call(session: Session) -> list[Job]:
            expired = select(Job.seq).where(Job.expires_at < now()).limit(EXPIRED_AT_A_TIME)
            seqs = list(session.scalars(expired))
            old = readable_jobs(session, seqs)
            session.execute(delete_jobs(Job.seq.in_(seqs)))
            return old

        return await self._database.write(call)

    async def counts(self, models: Mapping[str, str]) -> Counts:
        """Returns the numbers of jobs that have not ended.

        Args:
            models: identities of the caller's models, by name.
        """

        def call(session: Session) -> Counts:
            counted = select(Job.state, func.count(Job.seq), now() - func.min(Job.created_at))
            unfinished = counted.where(Job.state.in_(("queued", "running"))).group_by(Job.state)
            rows = {state: (count, age) for state, count, age in session.execute(unfinished)}
            queued, oldest_s = rows.get("queued", (0, 0.0))
            needed = func.coalesce(Job.identity, Job.model)
            foreign = select(needed, func.count(Job.seq)).where(Job.state == "queued", ~made_by(models))
            return Counts(
                queued=queued,
                running=rows.get("running", (0, 0.0))[0],
                oldest_s=oldest_s,
                foreign={one: int(count) for one, count in session.execute(foreign.group_by(needed))},
            )

        return await self._database.read(call)

    async def next_webhook(self, *, within_s: float, max_tries: int) -> Job | None:
        """Returns an ended job whose webhook is due; no other server gets it for `within_s` seconds.

        Args:
            within_s: seconds that a delivery may take.
            max_tries: most tries of one webhook.
        """

        def call(session: Session) -> Job | None:
            due = (
                select(Job.seq)
                .where(Job.webhook_at < now(), Job.webhook_attempts < max_tries)
                .order_by(Job.webhook_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            while (seq := session.scalar(due)) is not None:
                session.execute(
                    update_jobs(Job.seq == seq).values(
                        webhook_at=now() + within_s, webhook_attempts=Job.webhook_attempts + 1
                    )
                )
                try:
                    return one_job(session, Job.seq == seq)
                except UnreadableRecord as error:
                    given_up = "a webhook is given up, since its job cannot be read: %s"
                    logger.error(given_up, error.problem, extra=FAULT)  # noqa: TRY400
                    session.execute(update_jobs(Job.seq == seq).values(webhook_at=None))
            return None

        return await self._database.write(call)

    async def note_webhook(self, job_id: str, *, again_in_s: float | None, delivered: bool) -> None:
        """Notes the outcome of a delivery, and the seconds to the next try; None for no further one."""
        values = {
            "webhook_at": None if again_in_s is None else now() + again_in_s,
            "webhook_delivered_at": now() if delivered else None,
        }
        await self._database.write(
            lambda session: session.execute(update_jobs(Job.id == job_id).values(values))
        )
