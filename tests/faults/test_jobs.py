"""Jobs on real servers whose processes are killed. Each ends with one result and its webhook."""

import base64
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from deployments.families.glm_image import tiny
from tests.faults.jobs import Client, check
from tests.job_client import pixels
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
