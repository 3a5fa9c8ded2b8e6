"""Several nodes with simulated GPUs: placement, a lost node, updates and draining."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

import serve_app.app
from deployments.errors import EngineFault
from deployments.families import Decoder
from deployments.scaling import find_registry
from deployments.stages.models import DecoderStage
from deployments.types import Pixels
from serve_app.app import build_app
from serve_app.config import AppConfig
from tests.faults.conftest import Client, first_refused
from tests.polling import until
from tests.serve.conftest import ROOT, Running, tiny_model

pytestmark = pytest.mark.slow
LOST = "LOST_FILE"
"""Environment variable with the path of a file that shows that the GPU was lost."""
GPU = {"deployment": {"ray_actor_options": {"num_cpus": 0, "num_gpus": 1}}}


class FragileDecoderStage(DecoderStage):
    """A decoder stage that loses its GPU with the first image of all its replicas."""

    def _load(self, report: Callable[[float], None]) -> Decoder:
        decoder = super()._load(report)
        fragile: Any = decoder
        lost = Path(os.environ[LOST])

        def lose(*_: object) -> Pixels:
            lost.touch()
            fragile.fault = EngineFault("the decoder stopped: the device is lost")
            raise RuntimeError("the device is lost")

        if not lost.exists():
            fragile.decode = lose
        return decoder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node without a GPU, and two nodes with one GPU each."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
        )
        try:
            for _ in range(2):
                add_gpu(cluster)
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def add_gpu(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=0, num_gpus=1, include_dashboard=False)


def config(folder: Path, **changes: Any) -> AppConfig:
    settings = {
        "models": [tiny_model("m", prior=GPU, decoder=GPU)],
        "auth": {"open": True},
        "storage": {"url": str(folder)},
        "database": {"url": f"sqlite:///{folder}/jobs.db"},
    }
    return AppConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def client(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    app = build_app(config(tmp_path_factory.mktemp("files"), cluster={"autoscaling": True}))
    serve.run(app, name="app", route_prefix="/")
    running = Running(f"http://127.0.0.1:{port}", [], psutil.Process())
    with Client(running) as client:
        yield client


def node_of(client: Client, cluster: Cluster, stage: str) -> Any:
    (replica,) = client.running.replicas(f"m-{stage}")
    return next(
        node
        for node in cluster.list_all_nodes()
        if node.all_processes["raylet"][0].process.pid == replica.ppid()
    )


def test_each_stage_has_its_own_gpu(client: Client, cluster: Cluster) -> None:
    assert client.ask().status_code == 200
    nodes = {node_of(client, cluster, stage) for stage in ("prior", "decoder")}
    assert len(nodes) == 2
    assert cluster.head_node not in nodes


def test_a_request_survives_the_loss_of_a_node(client: Client, cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, num_inference_steps=60)
        until(lambda: client.working() == ["decoder"])
        (prior,) = client.running.replicas("m-prior")
        cluster.remove_node(node_of(client, cluster, "decoder"))
        until(
            lambda: client.stages("m")["decoder"] == {"state": "loading", "reason": "waiting for a GPU node"}
        )
        assert client.status()["queue_length"] == 1
        assert client.get("/readyz").status_code == 200
        add_gpu(cluster)
        assert answer.result().status_code == 200
    assert client.running.replicas("m-prior") == [prior]
    assert client.ask().status_code == 200


def test_a_killed_demand_registry_is_replaced(client: Client) -> None:
    old = find_registry("app")
    assert old
    ray.kill(old)
    for path in ("/health", "/v1/internal/status"):
        assert client.get(path).status_code == 200
    assert client.ask().status_code == 200
    until(lambda: find_registry("app") not in (None, old))
    assert client.get("/v1/internal/unload").status_code == 200
    assert not client.running.replicas("m-")
    assert client.ask().status_code == 200


def test_a_request_survives_a_lost_gpu(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = tmp_path / "lost"
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {LOST: str(lost)}}}
    model = tiny_model("m", decoder={"deployment": {"ray_actor_options": options}})
    monkeypatch.setattr(serve_app.app, "DecoderStage", FragileDecoderStage)
    app = build_app(config(tmp_path, models=[model]))
    serve.run(app, name="fragile", route_prefix="/fragile")
    try:
        with Client(Running(f"{client.running.url}/fragile", [], psutil.Process())) as fragile:
            answer, again = fragile.ask(seed=7), fragile.ask(seed=7)
            assert (answer.status_code, again.status_code) == (200, 200)
            assert answer.json()["data"] == again.json()["data"]
        assert lost.exists()
    finally:
        serve.delete("fragile")


def test_a_configuration_update_fails_no_request(client: Client, tmp_path: Path) -> None:
    with ThreadPoolExecutor(9) as pool:
        before = [pool.submit(client.ask, seed=seed, num_inference_steps=8) for seed in range(4)]
        until(lambda: len(client.status()["units"]) == 4)
        app = build_app(config(tmp_path, cluster={"autoscaling": True}, limits={"max_steps": 60}))
        update: Future[Any] = pool.submit(serve.run, app, name="app", route_prefix="/")
        during = []
        while not update.done():
            during.append(client.ask().status_code)
        update.result()
        assert set(during) == {200}
        assert [answer.result().status_code for answer in before] == [200] * 4
    assert client.ask(num_inference_steps=61).status_code == 400


def test_too_few_gpus_are_an_error_at_startup(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asks for 3 GPUs, and there are 2"):
        build_app(config(tmp_path, models=[tiny_model("m", prior=GPU, decoder=GPU | {"max_replicas": 2})]))


def test_draining_lets_accepted_requests_finish(client: Client, cluster: Cluster) -> None:
    """Must run last: afterwards the server rejects all requests."""
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.ask, seed=seed, num_inference_steps=60) for seed in range(4)]
        until(lambda: len(client.status()["units"]) == 4)
        drain = subprocess.Popen(
            [sys.executable, "-m", "serve_app", "drain"],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": cluster.address},
        )
        refused = first_refused(client)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert len(client.status()["units"]) > 0
        assert drain.poll() is None
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert drain.wait(60) == 0
