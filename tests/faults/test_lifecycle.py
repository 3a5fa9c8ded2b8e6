"""Loading on demand, unloading, load failures and stopping, on real servers."""

import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from deployments.families.glm_image import tiny
from serve_app import __version__
from tests.faults.conftest import Client, first_refused
from tests.polling import until
from tests.serve.conftest import Upstream, config_file, served, tiny_model

pytestmark = pytest.mark.slow
ROUNDS = 10
LONG: dict[str, Any] = {"num_inference_steps": 100}
UNLOADED = {"prior": {"state": "unloaded"}, "decoder": {"state": "unloaded"}}
IDLE_S = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lifecycle")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    idle = {"idle_timeout_s": IDLE_S}
    models = [
        tiny_model("good"),
        tiny_model("broken", checkpoint=str(folder / "nowhere")),
        tiny_model("brief", prior=idle, decoder=idle | {"max_replicas": 2}),
    ]
    with served(config_file(folder, models)) as running, Client(running) as client:
        yield client


@pytest.fixture
def cold(client: Client) -> Client:
    assert client.get("/v1/internal/unload?wait=true").status_code == 200
    return client


def test_status_requests_load_no_model(cold: Client) -> None:
    for path in ("/health", "/v1/internal/status", "/livez", "/readyz", "/v1/models", "/v1/internal/unload"):
        assert cold.get(path).status_code == 200
    assert cold.get("/health").json() == {
        "status": "ok",
        "version": __version__,
        "model_loaded": False,
        "models": dict.fromkeys(["good", "broken", "brief"], UNLOADED),
    }
    assert cold.status() == {"status": "idle", "queue_length": 0, "jobs_queued": 0, "units": []}
    assert not cold.running.replicas("good")


def is_loading(client: Client, stage: str) -> bool:
    return bool(0 <= client.stages("good")[stage].get("progress", -1) < 1)


def test_first_requests_load_both_stages_concurrently(cold: Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(cold.ask, seed=seed) for seed in range(4)]
        seen = []

        def both_load() -> bool:
            seen.append(cold.stages("good"))
            return {stage["state"] for stage in seen[-1].values()} == {"loading"}

        until(both_load)
        until(lambda: cold.status()["queue_length"] == 4)
        assert cold.status()["status"] == "loading"
        for stage in ("prior", "decoder"):
            until(partial(is_loading, cold, stage))
        assert [answer.result().status_code for answer in answers] == [200] * 4
    until(lambda: {stage["state"] for stage in cold.stages("good").values()} == {"ready"})
    assert cold.get("/health").json()["model_loaded"]
    assert cold.stages("broken") == UNLOADED


def test_a_busy_model_is_unloaded_only_by_force(cold: Client) -> None:
    assert cold.ask().status_code == 200
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(cold.ask, **LONG) for _ in range(2)]
        until(lambda: "decoder" in cold.working())
        refused = cold.get("/v1/internal/unload")
        assert refused.status_code == 409
        assert "2 generations are running" in refused.json()["error"]["message"]
        assert cold.get("/v1/internal/unload?model=brief").status_code == 200
        forced = cold.post("/v1/internal/unload?force=true")
        assert forced.status_code == 200
        assert forced.json()["models"]["good"] == UNLOADED
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["code"] == "unloaded"
            assert answer.result().headers["x-should-retry"] == "false"
    until(lambda: not cold.running.replicas("good"))
    assert cold.ask().status_code == 200


def test_a_model_can_be_unloaded_while_it_loads(cold: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cold.ask)
        until(lambda: "progress" in cold.stages("good")["prior"])
        assert cold.get("/v1/internal/unload").status_code == 409
        assert cold.get("/v1/internal/unload?force=true").status_code == 200
        assert answer.result().status_code == 503
    until(lambda: not cold.running.replicas("good"))
    assert cold.ask().status_code == 200


def test_a_stream_that_fails_ends_with_an_error_event(cold: Client) -> None:
    assert cold.ask().status_code == 200
    with ThreadPoolExecutor(1) as pool:
        sdk = openai.OpenAI(base_url=f"{cold.running.url}/v1", api_key="none", max_retries=0)
        stream = sdk.images.generate(prompt="a boat", stream=True, extra_body=LONG)
        events = pool.submit(list, stream)
        until(lambda: cold.working() != [])
        assert cold.get("/v1/internal/unload?force=true").status_code == 200
        with pytest.raises(openai.APIError, match="was unloaded by hand") as caught:
            events.result()
        assert caught.value.code == "unloaded"
        sdk.close()


def test_unloading_can_wait_for_running_requests(cold: Client) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(cold.ask, seed=seed, num_inference_steps=20) for seed in range(2)]
        until(lambda: len(cold.status()["units"]) == 2)
        assert cold.get("/v1/internal/unload?wait=true&model=good").status_code == 200
        assert [answer.result().status_code for answer in answers] == [200] * 2
    assert cold.stages("good") == UNLOADED


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("wait=banana", 400, "wait: Input should be a valid boolean"),
        ("wiat=true", 400, "wiat: Extra inputs are not permitted"),
        ("model=nobody", 404, "There is no model 'nobody'"),
    ],
)
def test_an_invalid_unload_request_is_rejected(client: Client, query: str, status: int, message: str) -> None:
    answer = client.get(f"/v1/internal/unload?{query}")
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_load_failure_is_reported_and_affects_no_other_model(cold: Client) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: cold.ask(model="broken", seed=seed), range(10)))
    for answer in answers:
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert error["code"] == "model_loading_failed"
        assert re.fullmatch(
            r"Model loading failed: checkpoint '…/nowhere' is not a folder .*", error["message"]
        )
    until(lambda: cold.stages("broken")["prior"]["state"] == "failed")
    assert "is not a folder" in cold.stages("broken")["prior"]["reason"]
    until(lambda: load_failures(cold) == 2)  # one load of each stage for all ten requests
    before = cold.running.replicas("broken")
    assert cold.ask().status_code == 200
    assert cold.ask(model="broken").status_code == 500
    until(lambda: load_failures(cold) == 3)
    assert cold.running.replicas("broken") == before, "Serve must not restart the replicas"


def load_failures(client: Client) -> int:
    return sum("loading failed" in line for line in client.running.log)


def test_the_next_request_retries_the_load(cold: Client, folder: Path) -> None:
    before = load_failures(cold)
    assert cold.ask(model="broken").status_code == 500
    until(
        lambda: load_failures(cold) == before + 2
    )  # otherwise the decoder's failure could be newer than the request
    missing = folder / "nowhere"
    missing.symlink_to(tiny.cached())
    try:
        assert cold.ask(model="broken").status_code == 200
    finally:
        missing.unlink()


def test_an_idle_stage_is_unloaded(client: Client) -> None:
    assert client.ask(model="brief").status_code == 200
    assert client.running.replicas("brief")
    until(lambda: client.stages("brief") == UNLOADED)
    until(lambda: not client.running.replicas("brief"))


def has_grown(count: Callable[[], int], before: int) -> bool:
    return count() > before


@pytest.mark.soak
def test_scaling_up_and_down_fails_no_request(client: Client) -> None:
    """Sends bursts of requests. A burst starts while replicas stop. At least one burst adds a replica."""

    def scalings(how: str) -> int:
        files = client.running.logs().glob("serve/controller_*.log")
        return sum(
            "brief" in line and how in line for file in files for line in file.read_text().splitlines()
        )

    for _ in range(5):
        before = scalings("Downscaling")
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda seed: client.ask(model="brief", seed=seed, num_inference_steps=20), range(6))
            )
        assert [answer.status_code for answer in answers] == [200] * 6
        until(partial(has_grown, lambda: scalings("Downscaling"), before))
    assert scalings("from 1 to 2") >= 1


@pytest.mark.soak
def test_a_load_failure_of_an_additional_replica_fails_no_request(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.symlink_to(tiny.cached())
    model = tiny_model("m", checkpoint=str(checkpoint), decoder={"max_replicas": 2})
    with served(config_file(tmp_path, [model])) as running, Client(running) as client:
        assert client.ask().status_code == 200
        checkpoint.unlink()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(client.ask, seed=seed, num_inference_steps=60) for seed in range(8)]
            until(lambda: load_failures(client) > 0)
            assert client.stages("m")["decoder"]["state"] in ("ready", "generating")
            assert [answer.result().status_code for answer in answers] == [200] * 8


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_repeated_unloading_leaks_no_process_and_no_memory(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Upstream(tiny.cached())
    server = psutil.Process(client.running.process.pid)
    durations: list[float] = []
    processes: list[int] = []
    memory: list[float] = []
    for seed in range(ROUNDS):
        expected = reference("a boat", 512, 512, seed=seed, steps=2)
        assert np.array_equal(client.pixels(client.ask(seed=seed)), expected)
        began = time.monotonic()
        assert client.get("/v1/internal/unload").status_code == 200
        durations.append(time.monotonic() - began)
        until(lambda: not client.running.replicas("good"))
        family = server.children(recursive=True)
        processes.append(len(family))
        memory.append(sum(process.memory_info().rss for process in family if process.is_running()) / 2**20)
    with capsys.disabled():
        print(
            f"\nunload: median {statistics.median(durations):.2f} s, slowest {max(durations):.2f} s; "
            f"processes {processes}; MiB {[round(each) for each in memory]}"
        )
    half = ROUNDS // 2
    assert statistics.median(processes[half:]) <= statistics.median(processes[:half])
    # The first rounds import modules.
    assert statistics.median(memory[-3:]) - statistics.median(memory[half - 2 : half + 1]) < 50


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_accepted_requests_finish(tmp_path: Path, sign: signal.Signals) -> None:
    with served(config_file(tmp_path, [tiny_model("m")])) as running, Client(running) as client:
        assert client.ask().status_code == 200
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(client.ask, seed=seed, num_inference_steps=20) for seed in range(8)]
            until(lambda: len(client.status()["units"]) == 8)
            running.send_signal(sign)
            until(lambda: any("Stopping" in line for line in running.log))
            rejected = first_refused(client)
            assert client.get("/readyz").status_code == 503
            assert client.get("/livez").status_code == 200
            assert [answer.result().status_code for answer in answers] == [200] * 8
        assert rejected.status_code == 503
        assert int(rejected.headers["retry-after"]) > 0
        assert rejected.json()["error"]["code"] == "stopping"
        running.process.wait(60)
    assert running.log[-1].strip().endswith("Stopped.") or any(
        "Stopped." in line for line in running.log[-3:]
    )


def test_a_second_stop_signal_aborts_running_requests(tmp_path: Path) -> None:
    with served(config_file(tmp_path, [tiny_model("m")])) as running, Client(running) as client:
        assert client.ask().status_code == 200
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.ask, size="1024x1024", num_inference_steps=100)
            until(lambda: "decoder" in client.working())
            running.send_signal(signal.SIGTERM)
            until(lambda: any("Stopping" in line for line in running.log))
            running.send_signal(signal.SIGTERM)
            running.process.wait(30)
            # A process of the stage may end first. The ingress can then still answer.
            with suppress(httpx.TransportError):
                assert answer.result().status_code >= 500
