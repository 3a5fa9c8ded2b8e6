"""Measures how fast stages load, unload and answer, and the cost of rejected requests.

    python -m tests.benchmarks.lifecycle [--rounds 20]

`make benchmark` runs this, over HTTP with the tiny checkpoint. The load time of a stage is
the time of a first request for which only that stage is cold. The time of a warm request is subtracted.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.conftest import Client
from tests.polling import until
from tests.serve.conftest import config_file, served, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

WARM = {"min_replicas": 1}
BRIEF = {"idle_timeout_s": 0.5}
PROBES = ("/health", "/v1/internal/status", "/livez", "/readyz")
MAX_PENDING = 64
REFUSED = 40


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def first_requests(client: Client, model: str, rounds: int) -> float:
    """Returns the median seconds of requests that load the stages with a short idle timeout."""

    def is_cold() -> bool:
        states = [stage["state"] for stage in client.stages(model).values()]
        return "unloaded" in states and set(states) <= {"unloaded", "ready"}

    times = []
    for _ in range(rounds):
        until(is_cold)
        times.append(seconds(lambda: client.ask(model=model).raise_for_status()))
    return statistics.median(times)


def cold_starts(folder: Path, rounds: int) -> None:
    models = [
        tiny_model("prior", prior=BRIEF, decoder=WARM),
        tiny_model("decoder", prior=WARM, decoder=BRIEF),
        tiny_model("both", prior=BRIEF, decoder=BRIEF),
    ]
    firsts = {}
    for model in models:  # one server each, so that loaded stages do not compete with others
        with served(config_file(folder, [model])) as running, Client(running) as client:
            firsts[model["name"]] = first_requests(client, model["name"], rounds)
            warm = statistics.median(seconds(lambda: client.ask().raise_for_status()) for _ in range(9))
    prior, decoder = firsts["prior"] - warm, firsts["decoder"] - warm
    ratio = firsts["both"] / (max(prior, decoder) + warm)
    print(f"load: prior {prior:.2f} s, decoder {decoder:.2f} s; a warm request {warm:.2f} s")
    print(
        f"first request with both cold {firsts['both']:.2f} s: {ratio:.2f} of the slower load and the request"
    )


def unloads(client: Client, rounds: int) -> None:
    times = []
    for _ in range(rounds):
        client.ask().raise_for_status()
        times.append(seconds(lambda: client.get("/v1/internal/unload").raise_for_status()))
    print(
        f"unload when idle: median {statistics.median(times):.2f} s, slowest {max(times):.2f} s of {rounds}"
    )


def probes(client: Client, work: Callable[[], Any]) -> dict[str, list[float]]:
    """Sends probes until the work is done, and returns their milliseconds by path."""
    times: dict[str, list[float]] = {path: [] for path in PROBES}
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        while not working.done():
            for path in PROBES:
                times[path].append(1000 * seconds(partial(client.get, path)))
                time.sleep(0.02)
        working.result()
    return times


def answers_meanwhile(client: Client) -> None:
    def make_images() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: client.ask(seed=seed, num_inference_steps=8), range(16)))

    client.get("/v1/internal/unload").raise_for_status()
    for what, work in (("loading", client.ask), ("both stages busy", make_images)):
        for path, times in probes(client, work).items():
            print(f"{path} while {what}: {_spread(times)}")


def refusals(client: Client, rounds: int) -> None:
    asked = MAX_PENDING + REFUSED
    counts, inside, outside = [], [], []
    for _ in range(rounds):
        client.ask().raise_for_status()
        lines = len(client.running.log)
        with ThreadPoolExecutor(asked) as pool:
            # Images of this size take seconds, so no place becomes free meanwhile.
            answers = [pool.submit(client.ask, seed=seed, size="1024x1024") for seed in range(asked)]
            ended = as_completed(answers)
            for _ in range(REFUSED):
                next(ended)
            client.get("/v1/internal/unload?force=true").raise_for_status()
        refused = [answer.result() for answer in answers if answer.result().status_code == 429]
        counts.append(len(refused))
        outside += [1000 * answer.elapsed.total_seconds() for answer in refused]
        logged = [re.search(r"generations 429 in ([\d.]+) s", line) for line in client.running.log[lines:]]
        inside += [1000 * float(line[1]) for line in logged if line]
    print(
        f"{asked} requests at once for {MAX_PENDING} places: 429 for {counts}; "
        f"in the ingress {_spread(inside)}; for the client {_spread(outside)}"
    )


def _spread(milliseconds: list[float]) -> str:
    ordered = sorted(milliseconds)
    return (
        f"median {statistics.median(ordered):.0f} ms, 95 % {ordered[int(0.95 * len(ordered))]:.0f} ms, "
        f"slowest {ordered[-1]:.0f} ms of {len(ordered)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cold_starts(folder, max(3, rounds // 4))
        limits = {"max_pending": MAX_PENDING}
        with (
            served(config_file(folder, [tiny_model("m")], limits=limits)) as running,
            Client(running) as client,
        ):
            unloads(client, rounds)
            answers_meanwhile(client)
            refusals(client, max(3, rounds // 4))


if __name__ == "__main__":
    main()
