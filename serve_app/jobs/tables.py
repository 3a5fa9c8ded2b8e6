"""The tables of jobs and signing keys. The migrations create them.

A new column needs a module in `migrations/additions`, and is nullable or has a server default.
"""

import secrets
import time
import uuid
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import JSON, BigInteger, Dialect, Double, LargeBinary, SmallInteger, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column, query_expression

from deployments.types import Pixels
from serve_app.generation.delivery import ImageRecord
from serve_app.generation.request import ResolvedRequest
from serve_app.jobs.database import now
from serve_app.jobs.records import (
    REQUEST_FIELDS,
    LogLine,
    StoredEncoding,
    StoredError,
    StoredImage,
    StoredPreview,
    StoredProgress,
    StoredRequest,
    UnreadableRecord,
)

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")
Priority = Literal["normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("normal", "low")


class _RecordColumn(TypeDecorator[Any]):
    """A JSON column that holds records of one type."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind  # a part of SQLAlchemy's cache key, as an argument of the constructor
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Returns the stored form of a record."""
        return None if value is None else self._adapter.dump_python(value, mode="json", exclude_none=True)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Returns the record of a stored form."""
        if value is None:
            return None
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            # Its text would hold the value, a prompt among it.
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UnreadableRecord(f"{where}: {first['msg']}") from None


class Base(MappedAsDataclass, DeclarativeBase):
    """Base of the tables. The migrations create them."""


class _PriorityNumber(TypeDecorator[Priority]):
    """A priority, stored by its place in the order of work."""

    impl = SmallInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Returns the number of a priority; a number stays as it is."""
        return PRIORITIES.index(value) if value in PRIORITIES else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Returns the priority of a number."""
        return None if value is None else PRIORITIES[value]


def _new_id() -> str:
    """Returns a UUID of version 7: https://www.rfc-editor.org/rfc/rfc9562#name-uuid-version-7.

    Python has it from 3.14 on.
    """
    version, variant = 7 << 76, 2 << 62
    time_ms = time.time_ns() // 1_000_000 << 80
    return str(uuid.UUID(int=time_ms | version | secrets.randbits(12) << 64 | variant | secrets.randbits(62)))


class Owner(NamedTuple):
    """The owner of a job. For others the job does not exist.

    Attributes:
        key_id: id of the API key; empty without one.
        api: name of the API by which the job was submitted, and is answered: at most 16 characters. An API
            that takes the URL of a webhook has it as a key of `Dialect.webhooks`.
    """

    key_id: str
    api: str


class Job(Base, kw_only=True):
    """A job. Times are in seconds since 1970, by the database's clock.

    Attributes:
        seq: grows from job to job.
        id: a UUID of version 7, with 74 random bits.
        key_id: see `Owner`.
        api: see `Owner`.
        idempotency_key: a second job of the same API key with the same one is this job.
        fingerprint: equal for equal requests.
        model: name of the model.
        identity: identity of the model; see `deployments.identity`. None for jobs of older servers, which
            any model of that name makes.
        work: megapixels of an image × denoising steps × images.
        turn: place in the order of work among jobs of one priority; see `JobStore.submit`.
        priority: jobs of low priority begin when no others wait.
        request: the request.
        sources: names of the files of its source images.
        encoding: file format of its images.
        answer: what the dialect needs to word its answers. Jobs of older servers lack keys that are new.
        webhook_url: URL to call when the job has ended.
        state: where the job is.
        version: grows with every change.
        worker: the runner that has the job.
        lease_until: time from which another runner may take the job.
        attempts: how often the job was begun.
        cancelling: whether cancellation was requested.
        progress: progress of each image; None before its first stage.
        previews: previews that the running job has.
        log: messages for people.
        images: images of the job that has succeeded.
        error: why it failed.
        start_by: time at which a job fails that has not begun.
        expires_at: time at which the job and its files are deleted.
        webhook_attempts: tries to call the webhook.
        webhook_at: time of the next try; None for no further one.
        position: number of jobs of its model that begin before it; None if it is not queued.
    """

    __tablename__ = "jobs"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, init=False)
    id: Mapped[str] = mapped_column(default_factory=_new_id)
    key_id: Mapped[str]
    api: Mapped[str]
    idempotency_key: Mapped[str | None] = mapped_column(default=None)
    fingerprint: Mapped[str]
    model: Mapped[str]
    identity: Mapped[str | None] = mapped_column(default=None)
    work: Mapped[float] = mapped_column(Double, default=0)
    turn: Mapped[float] = mapped_column(Double, default=0, init=False)
    priority: Mapped[Priority] = mapped_column(_PriorityNumber, default="normal")
    request: Mapped[StoredRequest] = mapped_column(_RecordColumn(StoredRequest))
    sources: Mapped[list[str]] = mapped_column(JSON, default_factory=list)
    encoding: Mapped[StoredEncoding] = mapped_column(_RecordColumn(StoredEncoding))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON, default_factory=dict)
    webhook_url: Mapped[str | None] = mapped_column(Text, default=None)
    state: Mapped[State] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(default=None)
    lease_until: Mapped[float | None] = mapped_column(Double, default=None)
    attempts: Mapped[int] = mapped_column(default=0)
    cancelling: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[list[StoredProgress | None]] = mapped_column(
        _RecordColumn(list[StoredProgress | None]), default_factory=list
    )
    previews: Mapped[list[StoredPreview]] = mapped_column(
        _RecordColumn(list[StoredPreview]), default_factory=list
    )
    log: Mapped[list[LogLine]] = mapped_column(_RecordColumn(list[LogLine]), default_factory=list)
    images: Mapped[list[ImageRecord]] = mapped_column(_RecordColumn(list[StoredImage]), default_factory=list)
    error: Mapped[StoredError | None] = mapped_column(_RecordColumn(StoredError), default=None)
    created_at: Mapped[float] = mapped_column(Double, insert_default=now(), init=False)
    start_by: Mapped[float] = mapped_column(Double, init=False)
    started_at: Mapped[float | None] = mapped_column(Double, default=None)
    ended_at: Mapped[float | None] = mapped_column(Double, default=None)
    expires_at: Mapped[float | None] = mapped_column(Double, default=None)
    webhook_attempts: Mapped[int] = mapped_column(default=0)
    webhook_at: Mapped[float | None] = mapped_column(Double, default=None)
    webhook_delivered_at: Mapped[float | None] = mapped_column(Double, default=None)
    position: Mapped[int | None] = query_expression()

    @property
    def owner(self) -> Owner:
        """The owner."""
        return Owner(self.key_id, self.api)

    @property
    def mark(self) -> str:
        """A text that changes with the job and with its position."""
        return f"{self.version}.{self.position or 0}"

    @property
    def has_ended(self) -> bool:
        """Whether the job is in its last state."""
        return self.state in ENDED

    @property
    def files(self) -> list[str]:
        """The names of all its files."""
        return [*self.sources, *(one.name for one in self.previews), *(one.name for one in self.images)]

    def resolved(self, pixels: tuple[Pixels, ...]) -> ResolvedRequest:
        """Returns the request, with its decoded source images."""
        return ResolvedRequest(
            **{name: getattr(self.request, name) for name in REQUEST_FIELDS},
            encoding=self.encoding.as_encoding(),
            api=self.api,
            request_id=self.id,
            key_id=self.key_id,
            pixels=pixels,
        )


class SigningKey(Base):
    """A key that signs webhooks. The newest one signs; all of them are published."""

    __tablename__ = "signing_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    secret: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[float] = mapped_column(Double, insert_default=now(), init=False)
