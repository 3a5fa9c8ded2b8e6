"""The bodies of fal's API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from serve_app.dialects.bodies import JSONFields
from serve_app.dialects.fal_and_pixazo import EditInput, ImageInput


class _Steps(JSONFields):
    num_inference_steps: int | None = Field(
        default=None,
        ge=10,
        le=100,
        description="Denoising steps. Defaults to 30 for GLM-Image, and to the model's steps for other "
        "models.",
    )


class TextToImage(_Steps, ImageInput):
    """Input of `fal-ai/glm-image`."""


class ImageToImage(_Steps, EditInput):
    """Input of `fal-ai/glm-image/image-to-image`."""


class File(BaseModel):
    """An image."""

    url: str = Field(description="URL of the file; a data URL with `sync_mode`.")
    content_type: str
    file_name: str
    file_size: int = Field(description="Bytes.")
    width: int
    height: int


class Timings(BaseModel):
    """Durations."""

    inference: float = Field(
        description="Seconds of both stages' work on one image, the longest of all images."
    )


class Output(BaseModel):
    """Images of a request."""

    images: list[File]
    timings: Timings
    seed: int = Field(description="Seed of the first image.")
    has_nsfw_concepts: list[bool] = Field(
        description="For each image, whether it was flagged and is black; false without a safety checker."
    )
    prompt: str = Field(description="The prompt that was painted: the new one, if it was expanded.")


class Problem(BaseModel):
    """A problem of the request."""

    loc: list[str | int]
    msg: str
    type: str


class FalError(BaseModel):
    """The answer to a request that fails."""

    detail: str | list[Problem]
    error_type: str | None = None


class Log(BaseModel):
    """A line of the log."""

    timestamp: str
    level: Literal["INFO"] = "INFO"
    source: Literal["USER"] = "USER"
    message: str


class Metrics(BaseModel):
    """Durations."""

    inference_time: float = Field(description="Seconds from the start to the end.")


StatusName = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


class Queued(BaseModel):
    """State of a request."""

    status: StatusName
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = Field(default=None, description="From 0; set while it is queued.")


class Submitted(Queued):
    """A request that was enqueued."""

    gateway_request_id: str


class Status(Queued):
    """State and log of a request."""

    logs: list[Log] | None = Field(
        default=None, description="Set once it is in progress; empty unless `logs` is true."
    )
    metrics: Metrics | None = Field(default=None, description="Set when it is completed.")
    error: str | None = Field(default=None, description="Set when it failed.")
    error_type: str | None = Field(default=None, description="Set when it failed.")


class Cancelling(BaseModel):
    """Outcome of a cancellation."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class UploadRequest(JSONFields):
    """An upload to come. Its format is read from its first bytes, not from these fields."""

    content_type: str | None = Field(default=None, max_length=255)
    file_name: str | None = Field(default=None, max_length=1024)


class Upload(BaseModel):
    """URLs of an upload."""

    upload_url: str = Field(description="PUT the image here, once and within an hour. Needs no key.")
    file_url: str = Field(description="URL of the image for later requests.")
