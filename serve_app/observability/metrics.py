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
    "HTTP requests, without probes, the pages for browsers and their files. `model` is empty if there is "
    "none. `outcome`: `succeeded`, `refused` (4xx), `rejected` (429, or 503 while stopping), `failed` (other "
    "5xx) or `cancelled` (the client disconnected). A stream that ends with an error has the outcome of the "
    "error.",
    "api",
    "route",
    "model",
    "outcome",
)
REQUEST_SECONDS = Histogram(
    "request_seconds", "Durations of requests that wait for images.", "api", "outcome"
)
ERRORS = Counter(
    "errors", "Errors in answers and of failed jobs, by the `code` of OpenAI's envelope.", "code"
)
IMAGES = Counter(
    "images",
    "Images of requests and of jobs. `outcome`: `made`, `flagged`, `refused` (the prompt is too long for the "
    "model), `failed` or `cancelled`.",
    "api",
    "model",
    "outcome",
)
MEGAPIXELS = Counter("megapixels", "Megapixels of finished images.", "api", "model")
PART_SECONDS = Histogram(
    "part_seconds",
    "Durations of the parts of an image, by `part`: `waiting` for a stage (loading included), `prior`, "
    "`decoder`, `safety`, `encoding`, `storing`; and of a request, `expansion`.",
    "model",
    "part",
)
WORKING_SECONDS = Counter(
    "working_seconds",
    "Sum of `part_seconds`, `waiting` included. Images in the prior stage overlap.",
    "model",
    "part",
)
RETRIES = Counter("retries", "Images that a stage made again because its replica had died.", "model", "stage")
PENDING = Gauge("pending", "Unfinished images of requests, in one ingress replica.")
JOBS = Gauge(
    "jobs",
    "Jobs that are `queued` or `running`, by `state`; `foreign` ones are queued, and wait for a model that "
    "this server lacks. Every ingress replica reports the same number.",
    "state",
)
OLDEST_JOB_SECONDS = Gauge(
    "oldest_job_seconds", "Age of the oldest queued job. Every ingress replica reports the same number."
)
JOBS_ENDED = Counter("jobs_ended", "Ended jobs.", "api", "model", "state")
WEBHOOKS = Counter(
    "webhooks",
    "Tries to deliver a webhook, by `outcome`: `delivered`, `failed`, `refused` (a 410, which ends the "
    "tries) or, for the last try, `given_up`.",
    "outcome",
)
FILES_BYTES = Gauge(
    "files_bytes", "Bytes of all files in the file store. Every ingress replica reports the same number."
)

BACKGROUND_FAILURES = Counter(
    "background_failures", "Failed runs of the periodic `task` of an ingress replica.", "task"
)

ALL: tuple[Metric, ...] = tuple(
    metric for module in (globals(), vars(stages)) for metric in module.values() if isinstance(metric, Metric)
)
"""All metrics of both planes."""


def note_part(model: str, name: str, seconds: float) -> None:
    """Counts the seconds of a part of the work."""
    PART_SECONDS.observe(seconds, model=model, part=name)
    WORKING_SECONDS.add(seconds, model=model, part=name)


@contextmanager
def part(model: str, name: str) -> Iterator[None]:
    """Counts the seconds of the block as a part of the work, unless it fails, and traces it as a span."""
    began = time.monotonic()
    with tracing.span(name):
        yield
    note_part(model, name, time.monotonic() - began)
