"""Tests of configs/cluster.yaml on one machine: one Ray node per pod, fake GPUs, PostgreSQL and S3.

The tests start and stop nodes themselves, because KubeRay's autoscaler is not part of Ray.
"""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer
from PIL import Image
from ray.cluster_utils import Cluster

from deployments.families.glm_image import tiny
from deployments.types import Pixels
from tests.polling import until
from tests.serve.conftest import OTHER_SIZES, ROOT, SMALL_SIZES, Running, Upstream

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
KEY = "key-of-the-cluster"
IDLE_S = 5
STEPS = 4
DECODER_BOUND_STEPS = 20
"""Steps with which the decoder is slower than the prior, so that requests queue before it."""
PROMPT = "a boat"


@dataclass
class Site:
    """A cluster and its configuration.

    Attributes:
        cluster: cluster of Ray nodes.
        nodes: nodes by worker group.
        folder: folder of the configuration's file.
        port: port of the proxy.
        dashboard: URL to which configurations are posted, as KubeRay does.
    """

    cluster: Cluster
    nodes: dict[str, list[Any]]
    folder: Path
    port: int
    dashboard: str
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = yaml.safe_load((ROOT / "configs/cluster.yaml").read_text())
        self.config["proxy_location"] = "HeadOnly"  # all nodes are one machine, with one port
        self.config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        self.args["public_url"] = self.url
        (model,) = self.args["models"]
        model["checkpoint"] = str(tiny.cached(SMALL_SIZES))
        for stage in (model["prior"], model["decoder"]):
            stage |= {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "idle_timeout_s": IDLE_S}
        model["decoder"]["max_replicas"] = 2

    @property
    def args(self) -> dict[str, Any]:
        args: dict[str, Any] = self.config["applications"][0]["args"]
        return args

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self) -> None:
        """Deploys the current configuration, without waiting until it is served."""
        file = self.folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(self.config))
        serve = Path(sys.executable).with_name("serve")
        command: list[str | Path] = [serve, "deploy", file, "--address", self.dashboard]
        subprocess.run(command, check=True, capture_output=True)

    def http(self) -> httpx.Client:
        # A kept connection of another thread may be closed at the moment it is reused.
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=240, limits=limits)

    def replicas(self, name: str) -> list[psutil.Process]:
        return Running(self.url, [], psutil.Process()).replicas(name)

    def decoders(self, http: httpx.Client) -> int:
        """Returns the number of ready decoders."""
        answer = http.get("/health")
        assert answer.status_code == 200, answer.text
        return int(answer.json()["models"]["glm-image"]["decoder"].get("replicas", 0))

    def add(self, kind: str) -> None:
        gpus = 0 if kind == "ingress" else 1
        node = self.cluster.add_node(num_cpus=2, num_gpus=gpus, resources={kind: 1}, **SMALL_NODE)
        self.nodes[kind].append(node)

    def kill(self, kind: str) -> None:
        """Kills a node."""
        self.cluster.remove_node(self.nodes[kind].pop(), allow_graceful=False)


SMALL_NODE: Any = {"include_dashboard": False, "object_store_memory": 200 * 2**20}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, postgresql: Callable[[], str]) -> Iterator[Site]:
    moto, database = ThreadedMotoServer("127.0.0.1", port=0), urlsplit(postgresql())
    moto.start()
    host, port = moto.get_host_and_port()
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        # The environment that the Secrets provide in pods.
        for name, value in {
            "RAY_TMPDIR": folder,
            "GLM_IMAGE_KEY": KEY,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "PGHOST": str(database.hostname),
            "PGPORT": str(database.port),
            "PGUSER": str(database.username),
            "PGDATABASE": database.path.strip("/"),
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="glm-image")
        dashboard, proxy = free_port(), free_port()
        head = SMALL_NODE | {"include_dashboard": True, "dashboard_port": dashboard}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, **head})
        try:
            site = Site(
                cluster,
                {"ingress": [], "prior": [], "decoder": []},
                tmp_path_factory.mktemp("site"),
                proxy,
                f"http://127.0.0.1:{dashboard}",
            )
            for kind in ("ingress", "ingress", "prior", "decoder", "decoder"):
                site.add(kind)
            site.deploy()
            until(lambda: is_ready(site) and len(site.replicas("glm-image:Ingress")) == 2, 180)
            yield site
        finally:
            cluster.shutdown()
            moto.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def is_ready(site: Site) -> bool:
    try:
        return httpx.get(f"{site.url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def body(seed: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "size": "512x512", "num_inference_steps": STEPS, "seed": seed} | fields


def pixels(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)))


def ask(site: Site, seed: int, steps: int) -> Pixels:
    """Requests an image with OpenAI's client, which retries after retryable errors."""
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=KEY, timeout=240) as sdk:
        answer = sdk.images.generate(
            prompt=PROMPT,
            size="512x512",
            response_format="b64_json",
            extra_body={"num_inference_steps": steps, "seed": seed},
        )
    assert answer.data
    return pixels(base64.b64decode(str(answer.data[0].b64_json)))


def ask_until(event: threading.Event, site: Site, seed: int, steps: int) -> list[Pixels]:
    """Requests an image again and again, so that there is work however fast the machine is."""
    images = [ask(site, seed, steps)]
    while not event.is_set():
        images.append(ask(site, seed, steps))
    return images


def submit(http: httpx.Client, seed: int, steps: int = STEPS) -> str:
    answer = http.post("/v1/images/jobs", json=body(seed, num_inference_steps=steps))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_stages_scale_from_zero_and_back_and_killed_nodes_lose_no_request(site: Site) -> None:
    paint = Upstream(tiny.cached(SMALL_SIZES))
    jobs_of, asked, steps = range(100, 116), range(200, 208), DECODER_BOUND_STEPS
    expected = {seed: paint(PROMPT, 512, 512, seed=seed, steps=steps) for seed in (*jobs_of, *asked)}
    with site.http() as http, ThreadPoolExecutor(8) as pool:
        assert not site.replicas("glm-image-prior") + site.replicas("glm-image-decoder"), "no stage runs yet"
        ids = {submit(http, seed, steps): seed for seed in jobs_of}
        killed = threading.Event()
        answers = {seed: pool.submit(ask_until, killed, site, seed, steps) for seed in asked}
        try:
            until(lambda: site.decoders(http) == 2, 180)
            site.replicas("glm-image:Ingress")[0].send_signal(signal.SIGKILL)
            site.kill("decoder")
        finally:
            killed.set()
        for seed, answer in answers.items():
            for image in answer.result():
                assert np.array_equal(image, expected[seed]), seed
        jobs = [made(http, job_id) for job_id in ids]
        for job in jobs:
            (image,) = job["result"]["data"]
            assert image["url"].startswith(site.url)
            assert np.array_equal(pixels(http.get(image["url"]).content), expected[ids[job["id"]]])
        site.add("decoder")
        until(lambda: not site.replicas("glm-image-prior") + site.replicas("glm-image-decoder"), 120)
        until(lambda: len(site.replicas("glm-image:Ingress")) == 2)
        assert max(line["status"] for line in requests(site)) < 500, (
            "only clients of the killed ingress had to retry"
        )
        assert_both_read_the_same(site, http, jobs[0]["result"]["data"][0]["url"])


def made(http: httpx.Client, job_id: str) -> Any:
    """Waits until a job has succeeded, and returns it."""
    jobs: list[Any] = []

    def ended() -> bool:
        answer = http.get(f"/v1/images/jobs/{job_id}")
        jobs[:] = [answer.json()]
        return answer.status_code == 200 and jobs[0]["status"] not in ("queued", "running")

    until(ended, 300)
    assert jobs[0]["status"] == "succeeded", jobs[0]
    return jobs[0]


def assert_both_read_the_same(site: Site, http: httpx.Client, url: str) -> None:
    """Reads a file until both ingresses have served it, and asserts that its content is always the same."""
    first = http.get(url)

    def have_both_answered() -> bool:
        answer = http.get(url, headers={"X-Request-ID": "read"})
        assert answer.status_code == 200
        assert answer.content == first.content
        return len({line["replica"] for line in requests(site) if line["request_id"] == "read"}) == 2

    # A new ingress gets no requests until Ray's proxy has heard of it, seconds after its process started.
    until(have_both_answered)


def requests(site: Site) -> list[dict[str, Any]]:
    """Returns the request lines in the logs of all ingresses."""
    (ingress, *_) = site.replicas("glm-image:Ingress")
    session = Path(ingress.environ()["RAY_TMPDIR"]) / "ray/session_latest/logs/serve"
    files = session.glob("replica_*Ingress*.log")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line.get("event") == "request"]


@contextmanager
def load(site: Site, threads: int = 4) -> Iterator[list[tuple[int, Pixels | str]]]:
    """Requests the same few images over and over within the block, without retries.

    Yields:
        A list of answers: the seed, and the pixels or the error.
    """
    came: list[tuple[int, Pixels | str]] = []
    stop = threading.Event()

    def request_repeatedly(seed: int) -> None:
        with site.http() as http:
            while not stop.is_set():
                answer = http.post("/v1/images/generations", json=body(seed, response_format="b64_json"))
                if answer.status_code == 200:
                    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
                    came.append((seed, pixels(data)))
                else:
                    came.append((seed, f"{answer.status_code} {answer.text}"))

    with ThreadPoolExecutor(threads) as pool:
        running: list[Future[None]] = [pool.submit(request_repeatedly, seed) for seed in range(threads)]
        try:
            yield came
        finally:
            stop.set()
        for one in running:
            one.result()


def pids(site: Site) -> set[int]:
    """Returns the process ids of the decoders."""
    return {process.pid for process in site.replicas("glm-image-decoder")}


def test_upgrades_under_load_lose_no_request(site: Site) -> None:
    old, new = tiny.cached(SMALL_SIZES), tiny.cached(OTHER_SIZES)
    expected = {
        (folder, seed): paint(PROMPT, 512, 512, seed=seed, steps=STEPS)
        for folder, paint in ((old, Upstream(old)), (new, Upstream(new)))
        for seed in range(4)
    }
    (model,) = site.args["models"]
    with site.http() as http, load(site) as came:

        def is_refused() -> bool:
            answer = http.post("/v1/images/generations", json=body(1, num_inference_steps=61))
            return answer.status_code == 400

        until(lambda: len(came) >= 4, 180)
        ids = [submit(http, seed) for seed in range(4)]

        site.args["limits"]["max_steps"] = 60
        site.deploy()
        until(is_refused, 300)

        # On a fast machine one decoder is enough for this load.
        until(lambda: site.decoders(http) >= 1, 180)
        before = pids(site)
        model["decoder"]["max_replicas"] = 1
        site.deploy()
        until(lambda: site.decoders(http) == 1 and not before & pids(site), 300)

        model["checkpoint"] = str(new)
        site.deploy()

        def is_new() -> bool:
            seed, image = came[-1]
            return isinstance(image, np.ndarray) and np.array_equal(image, expected[new, seed])

        until(is_new, 300)
        jobs = [made(http, job_id) for job_id in ids]
        assert len(jobs) == 4
    assert [image for _, image in came if isinstance(image, str)] == [], "requests failed"
    seen = {
        next((folder for folder in (old, new) if np.array_equal(image, expected[folder, seed])), None)
        for seed, image in came
    }
    assert seen == {old, new}
