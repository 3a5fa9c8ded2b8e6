"""Jobs on a real server: a client that retries, and what must hold when all have ended."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.job_client import PATH, SMALL, pixels
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import Running, Upstream


class Client:
    def __init__(self, running: Running, receiver: Receiver) -> None:
        self.running = running
        self._receiver = receiver
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=running.url, timeout=60, limits=limits)

    def submit(self, seed: int, **fields: Any) -> str:
        body = SMALL | {"seed": seed, "webhook_url": self._receiver.url} | fields
        answer = self.http.post(PATH, json=body)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str) -> Any:
        """Returns the job. Retries while the server is unavailable."""
        jobs: list[Any] = []

        def is_found() -> bool:
            try:
                answer = self.http.get(f"{PATH}/{job_id}")
            except httpx.TransportError:
                return False
            if answer.status_code == 200:
                jobs.append(answer.json())
            return bool(jobs)

        until(is_found)
        return jobs[0]

    def follow(self, job_id: str) -> list[str]:
        """Returns the event types of a job's stream, until the stream ends."""
        with self.http.stream("GET", f"/v1/images/jobs/{job_id}/events") as answer:
            return [line for line in answer.iter_lines() if line.startswith("event:")]

    def states(self, ids: list[str]) -> Counter[str]:
        return Counter(self.job(job_id)["status"] for job_id in ids)

    def wait_until_all_succeeded(self, ids: list[str]) -> list[Any]:
        until(lambda: self.states(ids) == {"succeeded": len(ids)}, 200)
        return [self.job(job_id) for job_id in ids]


def check(
    client: Client, jobs: list[Any], receiver: Receiver, folder: Path, reference: Upstream, seeds: range
) -> None:
    """Checks that each job has one image with its seed's pixels, and a webhook. Few other files remain."""
    for job, seed in zip(jobs, seeds, strict=True):
        (image,) = job["result"]["data"]
        assert image["seed"] == seed
        made = pixels(client.http.get(image["url"]).content)
        assert np.array_equal(made, reference("a boat", 512, 512, seed=seed))
    names = {job["result"]["data"][0]["url"].rpartition("/")[2] for job in jobs}
    assert len(names) == len(jobs)
    kept = {path.name for path in (folder / "files").iterdir()}
    assert names <= kept
    assert len(kept - names) <= 3, "only images in progress at the kill may be left over"
    until(lambda: {(job["id"], "image.job.succeeded") for job in jobs} == delivered(receiver))


def delivered(receiver: Receiver) -> set[tuple[str, str]]:
    """Returns the job ID and the event type of each webhook."""
    return {(headers["webhook-id"], json.loads(body)["type"]) for headers, body in receiver.came}
