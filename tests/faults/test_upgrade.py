"""Version 0.1.0 and this one take turns on the same jobs and files, and work side by side on them."""

import io
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.families.glm_image import tiny
from tests.faults.conftest import SMALL
from tests.faults.jobs import Client, check
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import ROOT, Running, Upstream, config_file, served, tiny_model

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
V1 = "a1fbf93"
"""The commit of version 0.1.0."""


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project at version 0.1.0, with an environment of its own, from its own lock."""
    folder = tmp_path_factory.mktemp("v1")
    archive = subprocess.run(["git", "archive", V1], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    subprocess.run(["make", ".venv/serve.stamp"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def config(tmp_path: Path, receiver: Receiver) -> Callable[..., Path]:
    """Makes a configuration of version 0.1.0: `rows` has another name now, and each stage reserved a CPU."""
    no_cpu: dict[str, Any] = {"deployment": {"ray_actor_options": {"num_cpus": 0}}}
    models = [tiny_model("glm-image", prior=no_cpu | {"rows": 2}, decoder=no_cpu)]
    return lambda **args: config_file(tmp_path, models, outbound={"allow": [receiver.place]}, **args)


@contextmanager
def load(running: Running) -> Iterator[list[int]]:
    """Requests images one after the other within the block; yields the status codes of their answers."""
    codes: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=120) as http:
            while not is_over.is_set():
                codes.append(http.post("/v1/images/generations", json=SMALL).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield codes
    finally:
        is_over.set()
        asking.join()


def test_jobs_survive_an_upgrade_and_the_way_back(
    v1: Path, config: Callable[..., Path], receiver: Receiver, tmp_path: Path
) -> None:
    ids: list[str] = []
    codes: list[int] = []
    seeds = iter(range(600, 700))

    def turn(project: Path, printed: str = "") -> None:
        """Runs a server until some of the jobs of this turn and of earlier ones have ended."""
        with served(config(), project=project) as running:
            client = Client(running, receiver)
            before = client.states(ids)["succeeded"]
            ids.extend(client.submit(next(seeds)) for _ in range(4))
            with load(running) as answered:
                until(lambda: client.states(ids)["succeeded"] >= before + 2)
            codes.extend(answered)
            assert client.states(ids)["succeeded"] < len(ids)
            assert printed in "".join(running.log)

    turn(v1)
    turn(ROOT, "prior.rows is now prior.max_batch_size")
    turn(v1)
    turn(ROOT)
    for project in (v1, ROOT):
        with served(config(), project=project) as running:
            client = Client(running, receiver)
            jobs = client.wait_until_all_succeeded(ids)
            check(client, jobs, receiver, tmp_path, Upstream(tiny.cached()), range(600, 600 + len(ids)))
    assert set(codes) == {200}


def test_two_versions_work_side_by_side(
    v1: Path,
    config: Callable[..., Path],
    receiver: Receiver,
    tmp_path: Path,
    postgresql: Callable[[], str],
) -> None:
    shared: dict[str, Any] = {"database": {"url": postgresql()}}
    with served(config(**shared), project=v1) as old:
        before = Client(old, receiver)
        ids = [before.submit(seed) for seed in range(700, 704)]
        with served(config(**shared)) as new:
            after = Client(new, receiver)
            ids += [client.submit(704 + turn) for turn, client in enumerate((before, after) * 4)]
            for client in (before, after):
                jobs = client.wait_until_all_succeeded(ids)
            check(after, jobs, receiver, tmp_path, Upstream(tiny.cached()), range(700, 700 + len(ids)))
        assert before.states(ids)["succeeded"] == len(ids), "the old version goes on"
        ids.append(before.submit(712))
        check(
            before,
            before.wait_until_all_succeeded(ids),
            receiver,
            tmp_path,
            Upstream(tiny.cached()),
            range(700, 700 + len(ids)),
        )
