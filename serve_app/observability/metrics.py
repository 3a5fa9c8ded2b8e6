"""Prometheus metrics of the API plane. Those of the stages are in `deployments.observability.metrics`."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.observability import metrics as stages
from deployments.observability import tracing
from deployments.observability.metrics import Counter, Gauge, Histogram, Metric

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS = Counter(
    "requests",
    "HTTP requests but for probes; `model` is empty where there is none. `outcome`: `succeeded`, `refused` "
    "(4xx), `rejected` (429, or 503 while stopping), `failed` (other 5xx, broken streams) or `cancelled` ("
    "the client has gone).",
    "api",
    "route",
    "model",
    "outcome",
)
REQUEST_SECONDS = Histogram(
    "request_seconds", "Their durations, of those that wait for images.", "api", "outcome"
)
ERRORS = Counter("errors", "Answers that are errors, by `code` as OpenAI's envelope has it.", "code")
IMAGES = Counter(
    "images",
    "Images of requests and of jobs. `outcome`: `made`, `flagged`, `refused` (the prompt is too long for the "
    "model), `failed` or `cancelled`.",
    "api",
    "model",
    "outcome",
)
MEGAPIXELS = Counter("megapixels", "Megapixels of those that were made.", "api", "model")
PART_SECONDS = Histogram(
    "part_seconds",
    "Where an image's time goes, by `part`: `waiting` for a stage (loading included), `prior`, "
    "`decoder`, `safety`, `encoding`, `storing`; and of a request `expansion`.",
    "model",
    "part",
)
WORKING_SECONDS = Counter("working_seconds", "The same seconds, added up.", "model", "part")
RETRIES = Counter(
    "retries", "Images that a stage was asked for again, since its replica had died.", "model", "stage"
)
PENDING = Gauge("pending", "Images of requests that are not finished, in one ingress replica.")
JOBS = Gauge(
    "jobs", "Jobs that are `queued` or `running`, by `state`; every ingress replica says the same.", "state"
)
OLDEST_JOB_SECONDS = Gauge("oldest_job_seconds", "Age of the oldest job that is queued; likewise.")
JOBS_ENDED = Counter("jobs_ended", "Jobs that have ended.", "api", "model", "state")
WEBHOOKS = Counter(
    "webhooks",
    "Tries to deliver a webhook, by `outcome`: `delivered`, `failed` or, the last one, `given_up`.",
    "outcome",
)
FILES_BYTES = Gauge(
    "files_bytes", "Bytes of all files in the file store; every ingress replica says the same."
)

ALL: tuple[Metric, ...] = tuple(
    metric for module in (globals(), vars(stages)) for metric in module.values() if isinstance(metric, Metric)
)
"""Every one that there is."""


def note_part(model: str, name: str, seconds: float) -> None:
    """Count the seconds of a part of the work."""
    PART_SECONDS.observe(seconds, model=model, part=name)
    WORKING_SECONDS.add(seconds, model=model, part=name)


@contextmanager
def part(model: str, name: str) -> Iterator[None]:
    """The block is a part of the work: its seconds count, if it does not fail, and it is a span."""
    began = time.monotonic()
    with tracing.span(name):
        yield
    note_part(model, name, time.monotonic() - began)
