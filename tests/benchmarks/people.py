"""Measures how long a small request waits while jobs of mixed sizes are queued.

    python -m tests.benchmarks.people [--jobs 50] [--requests 20]

`make benchmark` runs this on the tiny checkpoint. A request may wait for one image of a job in each stage. So
it should take at most 1.5 times the largest job's image, and its own time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.serve.conftest import config_file, served, tiny_model

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2}
JOBS = [
    {"prompt": "a boat", "size": size, "num_inference_steps": steps}
    for size, steps in (("512x512", 4), ("1024x1024", 4), ("768x768", 10), ("1280x1280", 6))
]


def seconds(client: httpx.Client, body: dict[str, object], seed: int) -> float:
    """Returns the seconds that a request takes."""
    began = time.perf_counter()
    client.post("/v1/images/generations", json=body | {"seed": seed}).raise_for_status()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        served(config_file(Path(folder), [tiny_model("m")])) as running,
        httpx.Client(base_url=running.url, timeout=600) as client,
    ):
        seconds(client, SMALL, 0)  # loads the model
        own = statistics.median(seconds(client, SMALL, seed) for seed in range(5))
        largest = max(min(seconds(client, job, seed) for seed in range(2)) for job in JOBS)
        for seed, job in zip(range(arguments.jobs), itertools.cycle(JOBS), strict=False):
            client.post("/v1/images/jobs", json=job | {"seed": seed}).raise_for_status()
        times = sorted(seconds(client, SMALL, seed) for seed in range(arguments.requests))
        queued = client.get("/v1/internal/status").json()["jobs_queued"]
        assert queued > 0, "the jobs ended too early"
        bound = 1.5 * largest + own
        print(f"a small request alone {own:.2f} s, the largest image of a job alone {largest:.2f} s")
        print(f"bound: 1.5 x {largest:.2f} s + {own:.2f} s = {bound:.2f} s")
        print(f"with {arguments.jobs} jobs, {queued} of them queued to the end, {len(times)} requests take:")
        median, slowest = statistics.median(times), times[-1]
        print(f"median {median:.2f} s, slowest {slowest:.2f} s = {slowest / bound:.2f} x bound")


if __name__ == "__main__":
    main()
