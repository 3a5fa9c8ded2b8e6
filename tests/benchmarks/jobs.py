"""Measures the server's times for submitting a job and for reading its status, with many jobs of one client.

    python -m tests.benchmarks.jobs [--jobs 500] [--database URL]

`make benchmark` runs this on the tiny checkpoint. The times are from the server's log: from the arrival of a
request until its response is sent.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from tests.polling import until
from tests.serve.conftest import Running, config_file, served, tiny_model

PATH = "/v1/images/jobs"
BODY = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 1}
MODEL = {"min_replicas": 1}


def milliseconds(running: Running, method: str, route: str) -> list[float]:
    """Returns the sorted durations of requests to a route, from the server's log."""
    (ingress,) = running.replicas(":Ingress")
    logs = Path(ingress.environ()["RAY_TMPDIR"]) / "ray/session_latest/logs/serve"
    lines = itertools.chain.from_iterable(file.read_text().splitlines() for file in logs.glob("*.log"))
    entries = [json.loads(line) for line in lines if f'"{route}"' in line]
    return sorted(1000 * one["seconds"] for one in entries if one["method"] == method)


def show(what: str, times: list[float]) -> None:
    p95 = times[int(0.95 * len(times))]
    print(f"{what:28} {len(times):6}   {statistics.median(times):7.1f} {p95:7.1f} {times[-1]:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--database", help="URL of the database (default: an SQLite file)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = {"database": {"url": arguments.database}} if arguments.database else {}
        config = config_file(folder, [tiny_model("m", prior=MODEL, decoder=MODEL)], **where)
        with served(config) as running, httpx.Client(base_url=running.url, timeout=60) as client:
            (ingress,) = running.replicas(":Ingress")
            client.post("/v1/images/generations", json=BODY).raise_for_status()
            before = ingress.memory_info().rss
            began = time.perf_counter()
            ids = []
            for seed in range(arguments.jobs):
                answer = client.post(PATH, json=BODY | {"seed": seed}).raise_for_status()
                ids.append(answer.json()["id"])
            submitted = time.perf_counter() - began
            asked = itertools.cycle(ids)

            def all_have_ended() -> bool:
                client.get(f"{PATH}/{next(asked)}").raise_for_status()
                left = [
                    client.get(PATH, params={"status": state, "limit": 1}).json()["data"]
                    for state in ("queued", "running")
                ]
                return left == [[], []]

            until(all_have_ended, 3600)
            whole = time.perf_counter() - began
            jobs = [client.get(f"{PATH}/{job_id}").json() for job_id in ids]
            assert [job["status"] for job in jobs] == ["succeeded"] * len(jobs)
            assert [job["result"]["data"][0]["seed"] for job in jobs] == list(range(len(jobs)))
            starts = [job["log"][0]["at"] for job in jobs]
            order = "in order" if starts == sorted(starts) else "NOT in order"
            print(f"{len(jobs)} jobs of 512x512, 1 step, begun {order}:", end=" ")
            print(f"submitted in {submitted:.1f} s, made in {whole:.0f} s")
            print(f"{'milliseconds in the server':28} number    median     95 %    most")
            show("submit", milliseconds(running, "POST", PATH))
            show("status, while they run", milliseconds(running, "GET", f"{PATH}/{{job_id}}"))
            show("list, while they run", milliseconds(running, "GET", PATH))
            grown = (ingress.memory_info().rss - before) / 2**20
            database = sum(file.stat().st_size for file in folder.glob("jobs.db*")) / 2**20
            print(f"the ingress has grown by {grown:.0f} MiB, the database's files have {database:.1f} MiB")


if __name__ == "__main__":
    main()
