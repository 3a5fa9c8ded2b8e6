"""Stored jobs: the typed records in the JSON columns of the tables.

The records are an interface: a server reads what an older one has written, and servers of two versions may
share a database while one replaces the other. A record without a `version` is of version 1, the only one so
far.

Stored names are those of `ResolvedRequest` and `ImageRecord`, except those in `_IMAGE_NAMES`. Whoever renames
an attribute there adds its old name here. `tests/unit/serve_app/jobs/test_upgrade.py` reads a database of
version 1. A new attribute needs a default. Older servers ignore it.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from serve_app.errors import (
    Busy,
    Conflict,
    Failed,
    Full,
    Gone,
    Invalid,
    InvalidParameter,
    NotFound,
    RequestError,
    TimedOut,
    Unavailable,
)
from serve_app.generation.delivery import ImageRecord
from serve_app.generation.events import Stage
from serve_app.generation.request import Encoding, ImageFormat, Moderation, ResolvedRequest


class StoredRecord(BaseModel):
    """Base of the records. One without a version has version 1. One of an unknown version is an error.

    To read a further version, convert its fields to the newest ones before validation.
    """

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = Field(default=1, exclude=True)


class StoredRequest(StoredRecord):
    """The request of a job, version 1. Its source images are files; see `Job.sources`.

    Attributes are those of `ResolvedRequest`.
    """

    prompt: str
    model: str
    size: tuple[int, int]
    n: int
    steps: int
    guidance_scale: float
    seed: int
    crop: tuple[int, int] | None = None
    negative_prompt: str = ""
    cfg_normalization: bool = False
    strength: float = 1
    partial_images: int = 0
    expand_prompt: bool = False
    moderation: Moderation = "auto"
    blacken: bool = False
    traceparent: str = ""

    @classmethod
    def of(cls, request: ResolvedRequest, traceparent: str) -> "StoredRequest":
        """Returns the stored form of a request.

        Args:
            request: the request.
            traceparent: trace context of the submission.
        """
        return cls.model_validate(
            {name: getattr(request, name) for name in REQUEST_FIELDS} | {"traceparent": traceparent}
        )


REQUEST_FIELDS = tuple(name for name in StoredRequest.model_fields if name not in ("version", "traceparent"))
"""Parameters of a request that are stored."""


class StoredEncoding(StoredRecord):
    """The file format of a job's images, version 1; see `Encoding`."""

    format: ImageFormat = "png"
    quality: int = 100

    def as_encoding(self) -> Encoding:
        """Returns the file format."""
        return Encoding(self.format, self.quality)


class StoredProgress(StoredRecord):
    """The progress of one image, version 1: its stage, and how many of how many tokens or steps are done."""

    stage: Stage
    done: int
    total: int


class StoredPreview(StoredRecord):
    """A preview, version 1: indexes of the image and of the preview, and the name of its file."""

    image: int
    index: int
    name: str


class LogLine(StoredRecord):
    """A line of a job's log, version 1: a time in seconds since 1970, and a message for people."""

    at: float
    message: str


_IMAGE_NAMES = {"risk": "unsafety", "generated_tokens": "drawn_tokens"}
"""Stored names of an `ImageRecord`, version 1, where they differ."""


def _image(stored: object) -> object:
    """Returns the attributes of an image's record from its stored form. Missing facts have defaults."""
    if not isinstance(stored, dict):
        return stored
    if (version := stored.get("version", 1)) != 1:
        raise ValueError(f"version {version} is unknown")
    known = {_IMAGE_NAMES.get(one.name, one.name): one.name for one in fields(ImageRecord)}
    given = {known[name]: value for name, value in stored.items() if name in known}
    return {"prompt": ""} | given


def _stored_image(image: ImageRecord) -> dict[str, Any]:
    """Returns the stored form of an image's record."""
    return {_IMAGE_NAMES.get(name, name): value for name, value in vars(image).items()}


StoredImage = Annotated[ImageRecord, BeforeValidator(_image), PlainSerializer(_stored_image)]


_KINDS: dict[int, type[RequestError]] = {
    400: Invalid,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: Busy,
    500: Failed,
    503: Unavailable,
    504: TimedOut,
    507: Full,
}
"""Stored numbers of the kinds of errors. They were HTTP statuses when this format was made."""


class StoredError(StoredRecord):
    """Why a job failed, version 1.

    Attributes:
        status: number of the error's kind.
        code: see `RequestError`.
        param: see `RequestError`.
        message: see `RequestError`; None for an `InvalidParameter`.
        problem: see `InvalidParameter`; None for other errors.
    """

    status: int
    code: str
    param: str | None = None
    message: str | None = None
    problem: str | None = None

    @classmethod
    def of(cls, error: RequestError) -> "StoredError":
        """Returns the stored form of an error."""
        status = next((number for number, kind in _KINDS.items() if isinstance(error, kind)), 500)
        if isinstance(error, InvalidParameter):
            return cls(status=status, code=error.code, param=error.param, problem=error.problem)
        return cls(status=status, code=error.code, param=error.param, message=error.message)

    def as_error(self) -> RequestError:
        """Returns the error. It is final: fetching the job again does not change it."""
        if self.problem is not None:
            return InvalidParameter(self.param or "", self.problem, code=self.code)
        kind = _KINDS.get(self.status, Failed)
        return kind(self.message or "", code=self.code, param=self.param, retryable=False)

    @property
    def is_fault(self) -> bool:
        """Whether the server is at fault, and not the request."""
        return self.status >= 500


class UnreadableRecord(Failed):
    """A stored record is not of a version that this server knows.

    Attributes:
        problem: what is wrong with the record, for the log.
    """

    CODE = "unreadable_job"

    def __init__(self, problem: str) -> None:
        super().__init__("The job was stored by another version of the server; submit it again.")
        self.problem = problem
