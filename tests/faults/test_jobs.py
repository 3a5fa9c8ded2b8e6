"""Jobs on real servers whose processes are killed. Each ends with one result and its webhook."""

import base64
import json
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deployments.families.glm_image import tiny
from tests.job_client import PATH, SMALL, pixels
from tests.pictures import picture
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import Running, Upstream, config_file, served, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
JOBS = 10
LEASE_S = 15


@pytest.fixture
def config(tmp_path: Path, receiver: Receiver) -> Callable[..., Path]:
    return lambda **args: config_file(
        tmp_path,
        [tiny_model("glm-image", prior={"max_batch_size": 2})],
        outbound={"allow": [receiver.place]},
        **args,
    )


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


def ingresses(running: Running) -> list[psutil.Process]:
    return running.replicas(":Ingress")


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(20)


def test_jobs_survive_a_killed_ingress(
    config: Callable[..., Path],
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    seeds = range(100, 100 + JOBS)
    with served(config()) as running:
        client = Client(running, receiver)
        ids = [client.submit(seed) for seed in seeds]
        until(lambda: client.states(ids)["succeeded"] >= 3)
        before = client.states(ids)
        assert before["running"] > 0
        assert before["queued"] > 0
        (ingress,) = ingresses(running)
        kill(ingress)
        jobs = client.wait_until_all_succeeded(ids)
        check(client, jobs, receiver, tmp_path, Upstream(tiny.cached()), seeds)


def test_queued_jobs_survive_a_restart(
    config: Callable[..., Path],
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    seeds = range(200, 200 + JOBS)
    with ThreadPoolExecutor(1) as pool, served(config()) as running:
        client = Client(running, receiver)
        ids = [client.submit(seed) for seed in seeds]
        followed = pool.submit(client.follow, ids[-1])
        until(lambda: client.states(ids)["succeeded"] >= 2)
    assert set(followed.result()) == {"event: queued"}, "a stop must end event streams"
    with served(config()) as running:
        client = Client(running, receiver)
        assert client.states(ids)["queued"] > 0
        jobs = client.wait_until_all_succeeded(ids)
        check(client, jobs, receiver, tmp_path, Upstream(tiny.cached()), seeds)
        restarts = [line["message"] for job in jobs for line in job["log"] if "again" in line["message"]]
        assert restarts == [], "a stop does not count as an attempt"


def test_jobs_inputs_and_results_survive_the_death_of_every_process(
    config: Callable[..., Path],
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    seeds, source = range(400, 406), np.full((512, 512, 3), 90, np.uint8)
    data_url = f"data:image/png;base64,{base64.b64encode(picture((90, 90, 90))).decode()}"
    with served(config()) as running:
        client = Client(running, receiver)
        ids = [client.submit(seed) for seed in seeds]
        edited = client.submit(500, images=[{"image_url": data_url}], webhook_url=None)
        until(lambda: client.states(ids)["succeeded"] >= 2)
        made = {job_id: job for job_id in ids if "result" in (job := client.job(job_id))}
        server = [running.process, *running.process.children(recursive=True)]
        for process in server:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(server, timeout=20)
    with served(config()) as running:
        client = Client(running, receiver)
        assert client.states([*ids, edited])["succeeded"] < len(ids), "the kill came too late"
        jobs = client.wait_until_all_succeeded([*ids, edited])[: len(ids)]
        reference = Upstream(tiny.cached())
        check(client, jobs, receiver, tmp_path, reference, seeds)
        for job in jobs:
            if job["id"] in made:
                assert job["result"]["data"][0]["url"].rpartition("/")[2] in str(made[job["id"]]["result"])
        (image,) = client.job(edited)["result"]["data"]
        expected = reference("a boat", 512, 512, seed=500, sources=(source,))
        assert np.array_equal(pixels(client.http.get(image["url"]).content), expected)


def test_jobs_of_a_killed_ingress_move_to_the_other_one(
    config: Callable[..., Path],
    receiver: Receiver,
    tmp_path: Path,
    postgresql: Callable[[], str],
) -> None:
    seeds = range(300, 300 + JOBS)
    several = {"database": {"url": postgresql()}, "ingress": {"deployment": {"num_replicas": 2}}}
    with served(config(**several)) as running:
        client = Client(running, receiver)
        until(lambda: len(ingresses(running)) == 2)
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(client.submit, seeds))
        until(lambda: client.states(ids)["succeeded"] >= 2)
        kill(ingresses(running)[0])
        jobs = client.wait_until_all_succeeded(ids)
        check(client, jobs, receiver, tmp_path, Upstream(tiny.cached()), seeds)
        restarted = [job for job in jobs if any("again" in line["message"] for line in job["log"])]
        assert restarted, "the killed ingress must have had running jobs"
        duration_s = max(job["ended_at"] for job in jobs) - min(job["started_at"] for job in jobs)
        assert duration_s < LEASE_S + 60
