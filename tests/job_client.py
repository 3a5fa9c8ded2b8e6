"""A client of jobs."""

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
from PIL import Image

from deployments.types import Pixels

PATH = "/v1/images/jobs"
SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2}


def submit(client: httpx.Client, key: str | None = None, **fields: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    answer = client.post(PATH, json=SMALL | fields, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def ended(client: httpx.Client, job: Any) -> Any:
    """Waits until the job has ended, and returns it."""
    return list(events(client, job))[-1]["data"]


def events(client: httpx.Client, job: Any, seen: str = "") -> Iterator[dict[str, Any]]:
    """Yields the job's events, parsed as by a browser's `EventSource`."""
    headers = {"Last-Event-ID": seen} if seen else {}
    with client.stream("GET", f"{PATH}/{job['id']}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name:
                event[name] = json.loads(value) if name == "data" else value
            elif event:
                yield event
                event = {}


def pixels(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
