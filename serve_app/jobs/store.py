"""Jobs: generations that are kept in the database until they have ended, and for a while after.

A job is queued, then running, then succeeded, failed or cancelled. Whoever runs it holds a lease, which is
renewed all the time; when that runs out, the job is anybody's again. Every step is one transaction that takes
effect only if the job still is where it was, so that a job ends exactly once, whatever dies when.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from serve_app.errors import NO_RETRY, RequestError
from serve_app.jobs.database import now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Row, Update

    from serve_app.jobs.database import Database

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
Priority = Literal["normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("normal", "low")

LEASE_S = 15
"""After which a job whose runner is not heard of any more is begun again by somebody else."""
MAX_ATTEMPTS = 5
"""So often a job is begun: one over which its runner keeps dying is given up."""
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
EXPIRED_AT_A_TIME = 200
LOOK_AGAIN_S = 1.0

_jobs = Table(
    "jobs",
    MetaData(),
    Column("seq", BigInteger, primary_key=True),
    Column("id", String),
    Column("key_id", String),
    Column("api", String),
    Column("idempotency_key", String),
    Column("fingerprint", String),
    Column("model", String),
    Column("priority", SmallInteger),
    Column("request", JSON),
    Column("sources", JSON),
    Column("encoding", JSON),
    Column("answer", JSON),
    Column("webhook_url", Text),
    Column("state", String),
    Column("version", Integer),
    Column("worker", String),
    Column("lease_until", Double),
    Column("attempts", Integer),
    Column("cancelling", Boolean),
    Column("progress", JSON),
    Column("previews", JSON),
    Column("log", JSON),
    Column("images", JSON),
    Column("error", JSON(none_as_null=True)),
    Column("created_at", Double),
    Column("start_by", Double),
    Column("started_at", Double),
    Column("ended_at", Double),
    Column("expires_at", Double),
    Column("webhook_attempts", Integer),
    Column("webhook_at", Double),
    Column("webhook_delivered_at", Double),
)
"""As the migrations make it."""
_j = _jobs.c


class Owner(NamedTuple):
    """Whose a job is; to all others it is not there.

    Attributes:
        key_id: of the API key; empty if there was none.
        api: the one by which it was submitted, in whose words it is answered.
    """

    key_id: str
    api: str


class Counts(NamedTuple):
    """How many jobs have not ended.

    Attributes:
        queued: how many wait.
        running: how many are made.
        oldest_s: age of the oldest one that waits; 0 if there is none.
    """

    queued: int
    running: int
    oldest_s: float


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is submitted.

    Attributes:
        owner: whose it is.
        fingerprint: equal for equal requests.
        model: by its name.
        request: the generation, but for its source images; all that was left out is filled in.
        sources: the names of their files.
        encoding: how the images become files.
        answer: what the API keeps, to word its answers.
        priority: those with a low one begin when there are no others.
        start_within_s: seconds, above 0, after which it fails if it has not begun.
        idempotency_key: a second job of this API key with the same one is the first.
        webhook_url: is told when the job has ended.
    """

    owner: Owner
    fingerprint: str
    model: str
    request: Mapping[str, Any]
    sources: Sequence[str] = ()
    encoding: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority = "normal"
    start_within_s: float | None = None
    idempotency_key: str | None = None
    webhook_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is in the database; times in seconds since 1970. See `NewJob` for what is not said here.

    Attributes:
        id: a UUID of version 7, with 74 random bits.
        seq: grows from job to job.
        state: where it is.
        version: grows with every change.
        attempts: how often it was begun.
        cancelling: whether it is to be cancelled; a running one takes a moment.
        progress: of each image that has begun, its `stage`, and how much is `done` of which `total`.
        previews: of each its `image`, its `index`, and the `name` of its file.
        log: lines for people: `at` when, and the `message`.
        images: of each its file's `name` and `bytes`, `width` and `height`, `seed`, and what it took.
        error: why it failed, see `serve_app.generation.delivery.failure`.
        position: how many jobs for its model are to begin before it; None if it is not queued.
    """

    id: str
    seq: int
    key_id: str
    api: str
    fingerprint: str
    model: str
    priority: Priority
    request: dict[str, Any]
    sources: list[str]
    encoding: dict[str, Any]
    answer: dict[str, Any]
    state: State
    version: int
    attempts: int
    cancelling: bool
    progress: list[dict[str, Any] | None]
    previews: list[dict[str, Any]]
    log: list[dict[str, Any]]
    images: list[dict[str, Any]]
    error: dict[str, Any] | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    expires_at: float | None
    webhook_url: str | None
    webhook_attempts: int
    webhook_at: float | None
    webhook_delivered_at: float | None
    position: int | None

    @property
    def mark(self) -> str:
        """Equal as long as nothing has changed."""
        return f"{self.version}.{self.position or 0}"

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.state in ENDED

    @property
    def files(self) -> list[str]:
        """The names of all files that are kept for it."""
        return self.sources + [one["name"] for one in self.previews + self.images]


@dataclass(kw_only=True)
class Running:
    """What is told of a running job, beside that it is running still."""

    id: str
    progress: list[dict[str, Any] | None]
    previews: list[dict[str, Any]]
    log: list[dict[str, Any]]


class JobStore:
    """Keeps the jobs.

    Args:
        database: where.
        max_jobs: so many that have not ended there may be.
        ttl_s: seconds for which one is kept after it has ended, and after which one fails that has not begun.
    """

    def __init__(self, database: Database, *, max_jobs: int, ttl_s: float) -> None:
        self._database = database
        self._max_jobs = max_jobs
        self._ttl_s = ttl_s
        self._watched: dict[str, asyncio.Event] = {}
        self._is_watched = True

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Keep a job; returns it, and whether it is new: not if its idempotency key has one already.

        Raises:
            RequestError: 409, that one was for another request; 429, there are too many jobs.
        """

        def call(connection: Connection) -> tuple[Job, bool]:
            self._database.one_at_a_time(connection)
            if known := self._known(connection, new):
                return known, False
            self._check_room(connection)
            job_id = _new_id()
            values = {
                "id": job_id,
                **new.owner._asdict(),
                "idempotency_key": new.idempotency_key,
                "fingerprint": new.fingerprint,
                "model": new.model,
                "priority": PRIORITIES.index(new.priority),
                "request": dict(new.request),
                "sources": list(new.sources),
                "encoding": dict(new.encoding),
                "answer": dict(new.answer),
                "webhook_url": new.webhook_url,
                "webhook_attempts": 0,
                "state": "queued",
                "version": 0,
                "attempts": 0,
                "cancelling": False,
                "progress": [],
                "previews": [],
                "log": [],
                "images": [],
                "created_at": now(),
                "start_by": now() + min(new.start_within_s or self._ttl_s, self._ttl_s),
            }
            connection.execute(insert(_jobs).values(values))
            return _one(connection, _j.id == job_id), True

        return await self._database.write(call)

    async def known(self, new: NewJob) -> Job | None:
        """The job that its idempotency key has already.

        Raises:
            RequestError: 409, that one was for another request.
        """
        return await self._database.read(lambda connection: self._known(connection, new))

    def _known(self, connection: Connection, new: NewJob) -> Job | None:
        if new.idempotency_key is None:
            return None
        mine = and_(_j.key_id == new.owner.key_id, _j.idempotency_key == new.idempotency_key)
        job = _first(connection, mine)
        if job and job.fingerprint != new.fingerprint:
            raise RequestError(
                "This Idempotency-Key was used for another request; take a new one for each.",
                param="Idempotency-Key",
                code="idempotency_key_reused",
                status=409,
                headers=NO_RETRY,
            )
        return job

    async def check_room(self) -> None:
        """Look whether there may be one more job.

        Raises:
            RequestError: 429, there are too many.
        """
        await self._database.read(self._check_room)

    def _check_room(self, connection: Connection) -> None:
        unfinished = select(func.count()).where(_j.state.in_(("queued", "running")))
        if (connection.scalar(unfinished) or 0) >= self._max_jobs:
            raise RequestError(
                f"The server has {self._max_jobs} jobs that have not ended, which is as many as it may have; "
                "try again later.",
                code="too_many_jobs",
                status=429,
                headers={"Retry-After": "30"},
            )

    async def get(self, owner: Owner, job_id: str) -> Job:
        """A job of this owner.

        Raises:
            RequestError: 404, it has none of that id.
        """
        mine = _belongs(job_id, owner)
        job = await self._database.read(lambda connection: _first(connection, mine))
        if job is None:
            raise _no_job()
        return job

    async def watch(self, owner: Owner, job_id: str, seen: str = "") -> AsyncIterator[Job]:
        """A job of this owner whenever it has changed, until it has ended or the server stops.

        Args:
            owner: whose.
            job_id: which.
            seen: the `mark` of what is known of it already.

        Raises:
            RequestError: 404, it has none of that id, or none any more.
        """
        while True:
            change = self._watched.setdefault(job_id, asyncio.Event())
            job = await self.get(owner, job_id)
            if job.mark != seen:
                seen = job.mark
                yield job
            if job.has_ended or not self._is_watched:
                self._touch(job_id)
                return
            with suppress(TimeoutError):  # others change it too, and its place in the queue
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await change.wait()

    def stop_watching(self) -> None:
        """Let those who watch go, since the server stops only when all requests have ended."""
        self._is_watched = False
        self._touch(*self._watched)

    def _touch(self, *job_ids: str) -> None:
        """Have those who watch these jobs look at them."""
        for job_id in job_ids:
            if change := self._watched.pop(job_id, None):
                change.set()

    async def page(
        self, owner: Owner, *, limit: int, after: str | None = None, state: State | None = None
    ) -> list[Job]:
        """Jobs of this owner, the newest first: those that were submitted before `after`.

        Raises:
            RequestError: 404, there is no `after`.
        """

        def call(connection: Connection) -> list[Job]:
            wanted = [_is_of(owner)]
            if state:
                wanted.append(_j.state == state)
            if after is not None:
                last = _first(connection, _belongs(after, owner))
                if last is None:
                    raise _no_job()
                wanted.append(_j.seq < last.seq)
            rows = connection.execute(_select().where(*wanted).order_by(_j.seq.desc()).limit(limit))
            return [_job(row) for row in rows]

        return await self._database.read(call)

    async def cancel(self, owner: Owner, job_id: str) -> Job:
        """Cancel a job of this owner: a queued one at once, a running one when its runner hears of it.

        Raises:
            RequestError: 404, it has none of that id; 409, the job has ended otherwise.
        """

        def call(connection: Connection) -> Job:
            mine = _belongs(job_id, owner)
            connection.execute(self._end("cancelled").where(mine, _j.state == "queued"))
            asked = update(_jobs).where(mine, _j.state == "running")
            connection.execute(asked.values(cancelling=True, version=_j.version + 1))
            job = _first(connection, mine)
            if job is None:
                raise _no_job()
            if job.state in ("succeeded", "failed"):
                raise RequestError(
                    f"The job has {job.state} already.", code="job_has_ended", status=409, headers=NO_RETRY
                )
            return job

        job = await self._database.write(call)
        self._touch(job_id)
        return job

    async def purge(self, owner: Owner, job_id: str) -> Job:
        """Delete a job of this owner that has ended; returns what it was. Its webhook is not told any more.

        Raises:
            RequestError: 404, it has none of that id; 409, the job has not ended.
        """

        def call(connection: Connection) -> Job:
            job = _first(connection, _belongs(job_id, owner))
            if job is None:
                raise _no_job()
            if not job.has_ended:
                raise RequestError(
                    f"The job is {job.state}; cancel it first.",
                    code="job_has_not_ended",
                    status=409,
                    headers=NO_RETRY,
                )
            connection.execute(delete(_jobs).where(_j.seq == job.seq))
            return job

        return await self._database.write(call)

    async def claim(self, worker: str, models: Collection[str]) -> Job | None:
        """Begin with the job of these models that is next, if there is one: it is `worker`'s to run."""

        def call(connection: Connection) -> Job | None:
            # Of its own leases, one that ran out is renewed when it can be: the work goes on.
            left = and_(_j.state == "running", _j.lease_until < now(), _j.worker != worker)
            free = or_(_j.state == "queued", left)
            following = (
                select(_j.seq)
                .where(free, _j.model.in_(models), ~_j.cancelling, _j.attempts < MAX_ATTEMPTS)
                .where(or_(_j.start_by >= now(), _j.started_at.is_not(None)))
                .order_by(_j.priority, _j.seq)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            seq = connection.scalar(following)
            if seq is None:
                return None
            connection.execute(
                update(_jobs)
                .where(_j.seq == seq)
                .values(
                    state="running",
                    worker=worker,
                    lease_until=now() + LEASE_S,
                    attempts=_j.attempts + 1,
                    started_at=func.coalesce(_j.started_at, now()),
                    version=_j.version + 1,
                )
            )
            return _one(connection, _j.seq == seq)

        if job := await self._database.write(call):
            self._touch(job.id)
        return job

    async def renew(self, worker: str, running: Collection[Running]) -> set[str]:
        """Tell how a worker's jobs get on, and that they do; returns those that it is to go on with."""

        def call(connection: Connection) -> set[str]:
            ours = and_(_j.worker == worker, _j.state == "running")
            connection.execute(update(_jobs).where(ours).values(lease_until=now() + LEASE_S))
            for one in running:
                told = update(_jobs).where(ours, _j.id == one.id)
                connection.execute(
                    told.values(
                        progress=one.progress, previews=one.previews, log=one.log, version=_j.version + 1
                    )
                )
            return set(connection.scalars(select(_j.id).where(ours, ~_j.cancelling)))

        mine = await self._database.write(call)
        self._touch(*(one.id for one in running))
        return mine

    async def finish(
        self,
        worker: str,
        told: Running,
        state: State,
        *,
        images: Sequence[Mapping[str, Any]] = (),
        error: Mapping[str, Any] | None = None,
    ) -> bool:
        """End a job that `worker` runs, as cancelled if and only if somebody asked for that.

        Returns:
            Whether it did; else it is somebody else's by now, or it is to be cancelled.
        """

        def call(connection: Connection) -> bool:
            ours = and_(_j.id == told.id, _j.worker == worker, _j.state == "running")
            ours = and_(ours, _j.cancelling if state == "cancelled" else ~_j.cancelling)
            ending = self._end(state, images=list(images), error=error and dict(error), log=told.log)
            return connection.execute(ending.where(ours)).rowcount == 1

        done = await self._database.write(call)
        self._touch(told.id)
        return done

    async def release(self, worker: str) -> None:
        """Put what a worker runs back into the queue, to its old place."""

        def call(connection: Connection) -> None:
            ours = update(_jobs).where(_j.worker == worker, _j.state == "running", ~_j.cancelling)
            connection.execute(
                ours.values(
                    state="queued",
                    worker=None,
                    lease_until=None,
                    attempts=_j.attempts - 1,
                    progress=[],
                    version=_j.version + 1,
                )
            )

        await self._database.write(call)

    async def tidy(self) -> list[Job]:
        """End what nobody will: too late to start, cancelled when its runner died, begun too often.

        Returns:
            What it has ended.
        """
        late = {
            "message": "The job was not begun within the time that it was given for that.",
            "code": "start_timeout",
            "status": 504,
            "param": None,
        }
        hopeless = {
            "message": f"The server died {MAX_ATTEMPTS} times while it made this job; its log says why.",
            "code": "interrupted",
            "status": 500,
            "param": None,
        }
        orphaned = and_(_j.state == "running", _j.lease_until < now())

        def call(connection: Connection) -> list[Job]:
            ended: list[str] = []
            for ending, which in (
                (
                    self._end("failed", error=late),
                    and_(_j.state == "queued", _j.start_by < now(), _j.started_at.is_(None)),
                ),
                (self._end("cancelled"), and_(orphaned, _j.cancelling)),
                (self._end("failed", error=hopeless), and_(orphaned, _j.attempts >= MAX_ATTEMPTS)),
            ):
                ended += connection.scalars(ending.where(which).returning(_j.id))
            return [_one(connection, _j.id == job_id) for job_id in ended]

        ended = await self._database.write(call)
        self._touch(*(job.id for job in ended))
        return ended

    async def expire(self) -> list[Job]:
        """Delete jobs that ended long ago, some at a time; returns them."""

        def call(connection: Connection) -> list[Job]:
            old = _select().where(_j.expires_at < now()).limit(EXPIRED_AT_A_TIME)
            jobs = [_job(row) for row in connection.execute(old)]
            connection.execute(delete(_jobs).where(_j.seq.in_([job.seq for job in jobs])))
            return jobs

        return await self._database.write(call)

    async def counts(self) -> Counts:
        """How many jobs have not ended."""

        def call(connection: Connection) -> Counts:
            counted = select(_j.state, func.count(), now() - func.min(_j.created_at))
            unfinished = counted.where(_j.state.in_(("queued", "running"))).group_by(_j.state)
            rows = {state: (count, age) for state, count, age in connection.execute(unfinished)}
            queued, oldest_s = rows.get("queued", (0, 0.0))
            return Counts(queued=queued, running=rows.get("running", (0, 0.0))[0], oldest_s=oldest_s)

        return await self._database.read(call)

    async def next_webhook(self, *, within_s: float, most: int) -> Job | None:
        """An ended job whose webhook is due; nobody else gets it for `within_s` seconds.

        Args:
            within_s: how long to deliver may take.
            most: how often it is tried.
        """

        def call(connection: Connection) -> Job | None:
            due = (
                select(_j.seq)
                .where(_j.webhook_at < now(), _j.webhook_attempts < most)
                .order_by(_j.webhook_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            seq = connection.scalar(due)
            if seq is None:
                return None
            trying = update(_jobs).where(_j.seq == seq)
            connection.execute(
                trying.values(webhook_at=now() + within_s, webhook_attempts=_j.webhook_attempts + 1)
            )
            return _one(connection, _j.seq == seq)

        return await self._database.write(call)

    async def note_webhook(self, job_id: str, *, again_in_s: float | None, delivered: bool) -> None:
        """Note how a webhook's delivery went, and when to try again; None, never."""
        values = {
            "webhook_at": None if again_in_s is None else now() + again_in_s,
            "webhook_delivered_at": now() if delivered else None,
        }
        await self._database.write(
            lambda connection: connection.execute(update(_jobs).where(_j.id == job_id).values(values))
        )

    def _end(self, state: State, **values: Any) -> Update:
        """What ending a job sets; which one is to be added."""
        return update(_jobs).values(
            state=state,
            worker=None,
            lease_until=None,
            ended_at=now(),
            expires_at=now() + self._ttl_s,
            webhook_at=case((_j.webhook_url.is_not(None), now())),
            version=_j.version + 1,
            **values,
        )


def _new_id() -> str:
    """https://www.rfc-editor.org/rfc/rfc9562#name-uuid-version-7, which Python has from 3.14 on."""
    version, variant = 7 << 76, 2 << 62
    time_ms = time.time_ns() // 1_000_000 << 80
    return str(uuid.UUID(int=time_ms | version | secrets.randbits(12) << 64 | variant | secrets.randbits(62)))


def _select() -> Any:
    """All of a job, its position too."""
    other = _jobs.alias()
    ahead = (
        select(func.count())
        .select_from(other)
        .where(other.c.state == "queued", other.c.model == _j.model)
        .where(
            or_(
                other.c.priority < _j.priority,
                and_(other.c.priority == _j.priority, other.c.seq < _j.seq),
            )
        )
        .scalar_subquery()
    )
    return select(_jobs, case((_j.state == "queued", ahead), else_=literal(None)).label("position"))


def _first(connection: Connection, *which: ColumnElement[bool]) -> Job | None:
    row = connection.execute(_select().where(*which)).first()
    return _job(row) if row else None


def _one(connection: Connection, which: ColumnElement[bool]) -> Job:
    return _job(connection.execute(_select().where(which)).one())


def _job(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    for name in ("idempotency_key", "worker", "lease_until", "start_by"):  # nobody else's business
        del values[name]
    return Job(**values | {"priority": PRIORITIES[values["priority"]]})


def _is_of(owner: Owner) -> ColumnElement[bool]:
    return and_(_j.key_id == owner.key_id, _j.api == owner.api)


def _belongs(job_id: str, owner: Owner) -> ColumnElement[bool]:
    """The job of this id, if it is this owner's.

    Raises:
        RequestError: 404, it is no id.
    """
    if not ID.fullmatch(job_id):  # PostgreSQL takes not just any text
        raise _no_job()
    return and_(_j.id == job_id, _is_of(owner))


def _no_job() -> RequestError:
    return RequestError("There is no such job.", code="job_not_found", status=404)
