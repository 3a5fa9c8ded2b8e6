"""A long night on a real server: mixed work by a seeded generator, faults, and the accounts at the end.

    python -m tests.faults.night [--seconds 3600] [--fault-every 150] [--seed 0]

Clients use all APIs, edit, cancel, hang up, purge and send nonsense. Every `--fault-every` seconds there is a
fault: a process is killed, the models are unloaded, the disk is full or the database is away. Afterwards each
job must have ended once, each answer must have had the right pixels, the files must be those that answers and
jobs name, and no process may have grown.

The module is long because the accounts rely on what each kind of work has noted.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import random
import secrets
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from deployments.families.glm_image import tiny
from deployments.types import Pixels
from tests import postgresql
from tests.apis import APIS, EDITING, Asked, By, RefusedError, by_pixazo, by_zais_task, pixels
from tests.job_client import PATH
from tests.pictures import picture
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import Running, Upstream, config_file, served, tiny_model

CLIENTS = 4
STEPS = 10
"""The fewest denoising steps that all APIs accept."""
FULL_S, AWAY_S = 20, 60
"""Seconds for which the disk is full, and the database away."""
FAULTS = 6
SETTLED_S = 15
"""Seconds after a fault in which its consequences are excused."""
SPARE_BYTES = min(2**33, shutil.disk_usage(tempfile.gettempdir()).free // 4)
"""Free bytes above the store's `min_free_bytes`, which the full disk takes away.

They are many, because other programs use the disk in a night too.
"""
SAMPLE_S = 5.0
LOGS = 2
"""Log files of a process of Ray. The log monitor keeps them open after the process has ended."""
KEEPING = (by_zais_task, by_pixazo)
"""APIs that keep a file although the answer contains the image."""
ENDED = ("succeeded", "failed", "cancelled")
NONSENSE = (
    (b"{", 400),
    (b'{"prompt": 7}', 400),
    (b'{"prompt": "a boat", "size": "513x512"}', 400),
    (b'{"prompt": "a boat", "unheard_of": 1}', 400),
    (b'{"prompt": "a boat", "model": "nothing"}', 404),
)


@dataclass(frozen=True)
class Fault:
    """A fault and what it excuses.

    Attributes:
        name: its name in the report.
        excuses: status codes of answers while it lasts; 0 stands for a lost connection.
        happen: causes it; returns when it is over.
    """

    name: str
    excuses: frozenset[int]
    happen: Callable[[], None]


@dataclass
class Submitted:
    """A job that the server has accepted.

    Attributes:
        asked: its image.
        end: the state that it must reach.
    """

    asked: Asked
    end: str = "succeeded"


@dataclass
class Samples:
    """Measurements of a process, every `SAMPLE_S` seconds.

    Attributes:
        mib: resident memory.
        files: number of open files.
        threads: number of threads.
    """

    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


@dataclass
class Report:
    """The accounts of a night.

    Attributes:
        outcomes: number of each kind of work's outcomes.
        faults: number of the faults of each name.
        problems: what must not happen.
        jobs: number of jobs in their last states.
        files: number and bytes of the files at the end.
        processes: measurements, by process.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)
    files: tuple[int, int] = (0, 0)
    processes: dict[str, Samples] = field(default_factory=lambda: defaultdict(Samples))

    def growth(self, values: list[float] | list[int]) -> tuple[float, float]:
        """Returns the medians of the second and of the last quarter of a process's measurements."""
        quarter = len(values) // 4
        return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])

    def show(self) -> None:
        """Prints the accounts."""
        print("\nwork                  outcome                      number")
        for (work, outcome), number in sorted(self.outcomes.items()):
            print(f"{work:22}{outcome:25}{number:10}")
        print("\nfaults:", ", ".join(f"{name} {number}" for name, number in sorted(self.faults.items())))
        print("jobs:", ", ".join(f"{state} {number}" for state, number in sorted(self.jobs.items())))
        print(f"files: {self.files[0]}, {self.files[1]} bytes")
        print(f"\n{'process':46} minutes{'MiB':>12}{'files':>17}{'threads':>15}")
        for name, samples in sorted(self.processes.items()):
            if len(samples.mib) >= 8:
                parts = [self.growth(one) for one in (samples.mib, samples.files, samples.threads)]
                shown = "".join(f"{a:8.0f} → {b:<5.0f}" for a, b in parts)
                print(f"{name:46}{len(samples.mib) * SAMPLE_S / 60:8.1f}{shown}")
        print("\nproblems:", "none" if not self.problems else "")
        for problem in self.problems:
            print(f"  {problem}")


class Night:
    """The clients, the faults and the measurements.

    Args:
        running: the server.
        receiver: takes the webhooks.
        database: the server of the database.
        folder: where the server keeps its files.
        seed: seed of the work.
    """

    def __init__(
        self, running: Running, receiver: Receiver, database: postgresql.PostgreSQL, folder: Path, seed: int
    ) -> None:
        self._running = running
        self._receiver = receiver
        self._database = database
        self._folder = folder
        self._seed = seed
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._jobs: dict[str, Submitted] = {}
        self._files: dict[str, Asked] = {}
        self._orphans = 0
        self._excuses: list[tuple[float, float, frozenset[int]]] = []
        self._expected: dict[Asked, Pixels] = {}
        self.report = Report()
        self._cases = self._all_cases()

    def _all_cases(self) -> tuple[list[Asked], list[Asked]]:
        """Returns the images and the edits that clients ask for, and makes them by diffusers."""
        reference = Upstream(tiny.cached())
        images = [Asked(f"a boat {seed}", 2**40 + seed, STEPS) for seed in range(9)]
        edits = []
        for seed in range(3):
            colour = (40 * seed, 200, 90)
            data = base64.b64encode(picture(colour)).decode()
            edits.append(Asked(f"a green boat {seed}", seed, STEPS, f"data:image/png;base64,{data}"))
            source = np.full((512, 512, 3), colour, np.uint8)
            self._expected[edits[-1]] = reference(
                edits[-1].prompt, 512, 512, seed=seed, steps=STEPS, sources=(source,)
            )
        for one in images:
            self._expected[one] = reference(one.prompt, 512, 512, seed=one.seed, steps=one.steps)
        return images, edits

    def run(self, seconds: float, fault_every_s: float) -> Report:
        """Runs the night; returns its report."""
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(CLIENTS)]
        threads.append(threading.Thread(target=self._measure))
        for thread in threads:
            thread.start()
        began, faults = time.monotonic(), itertools.cycle(self._faults())
        for number in range(1, int(seconds / fault_every_s)):
            time.sleep(max(0, began + number * fault_every_s - time.monotonic()))
            fault = next(faults)
            with self._excused(fault.excuses):
                fault.happen()
            self.report.faults[fault.name] += 1
        time.sleep(max(0, began + seconds - time.monotonic()))
        self._is_over.set()
        for thread in threads:
            thread.join()
        self._settle()
        return self.report

    def _http(self) -> httpx.Client:
        # The server could close an idle connection just as it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self._running.url, timeout=120, limits=limits)

    def _faults(self) -> list[Fault]:
        """Returns the faults in their order. A request survives one killed stage."""
        away = frozenset({0, 500, 502, 503, 504})
        return [
            Fault("decoder killed", frozenset(), lambda: self._kill("decoder")),
            Fault("unloaded", frozenset({500, 503}), self._unload),
            Fault("ingress killed", away, lambda: self._kill(":Ingress")),
            Fault("disk full", frozenset({507}), self._fill_disk),
            Fault("prior killed", frozenset(), lambda: self._kill("prior")),
            Fault("database away", frozenset({500, 503}), self._leave_database),
        ]

    @contextmanager
    def _excused(self, codes: frozenset[int]) -> Iterator[None]:
        began = time.monotonic()
        with self._lock:
            self._excuses.append((began, float("inf"), codes))
        yield
        with self._lock:
            self._excuses[-1] = (began, time.monotonic() + SETTLED_S, codes)

    def _is_excused(self, code: int, began: float) -> bool:
        with self._lock:
            return any(code in codes and until >= began for _, until, codes in self._excuses)

    def _kill(self, name: str) -> None:
        until(lambda: bool(self._running.replicas(name)))
        killed = self._running.replicas(name)[0]
        killed.send_signal(signal.SIGKILL)
        killed.wait(20)
        with self._http() as http:
            until(lambda: self._status(http) == 200)

    def _status(self, http: httpx.Client) -> int:
        try:
            return http.get("/readyz").status_code
        except httpx.TransportError:
            return 0

    def _unload(self) -> None:
        with self._http() as http:
            until(lambda: http.post("/v1/internal/unload?force=true").status_code == 200)

    def _fill_disk(self) -> None:
        file = self._folder / "filling"
        with file.open("wb") as filling:
            os.posix_fallocate(filling.fileno(), 0, 2 * SPARE_BYTES)
        time.sleep(FULL_S)
        file.unlink()

    def _leave_database(self) -> None:
        self._database.stop()
        time.sleep(AWAY_S)
        self._database.start()

    def _measure(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            for process in self._running.process.children(recursive=True):
                with suppress(psutil.Error):
                    samples = self.report.processes[f"{title(process)} {process.pid}"]
                    samples.mib.append(process.memory_info().rss / 2**20)
                    samples.files.append(process.num_fds())
                    samples.threads.append(process.num_threads())

    def _work(self, number: int) -> None:
        """Does one piece of work after the other, as a client would."""
        rng = random.Random(f"{self._seed} {number}")
        kinds: dict[Callable[[httpx.Client, random.Random], str], int] = {
            self._image: 12,
            self._edit: 3,
            self._submit: 6,
            self._cancel: 2,
            self._purge: 1,
            self._hang_up: 3,
            self._talk_nonsense: 3,
        }
        with self._http() as http:
            while not self._is_over.is_set():
                work = rng.choices(list(kinds), list(kinds.values()))[0]
                began = time.monotonic()
                try:
                    outcome = work(http, rng)
                except (RefusedError, httpx.TransportError) as error:
                    code = error.status if isinstance(error, RefusedError) else 0
                    self._give_up()
                    outcome = f"excused {code}" if self._is_excused(code, began) else f"failed {code}"
                    if outcome.startswith("failed"):
                        self._problem(f"{work.__name__[1:]}: {error!r:.300}")
                except Exception as error:  # noqa: BLE001 - the night goes on, and reports it
                    outcome = "failed"
                    self._problem(f"{work.__name__[1:]}: {error!r:.300}")
                with self._lock:
                    self.report.outcomes[work.__name__[1:].replace("_", " "), outcome] += 1

    def _give_up(self) -> None:
        """Counts a request whose file, if there is one, is nobody's."""
        with self._lock:
            self._orphans += 1

    def _problem(self, text: str) -> None:
        with self._lock:
            self.report.problems.append(text)

    def _check(self, made: Pixels, asked: Asked, where: str) -> None:
        if not np.array_equal(made, self._expected[asked]):
            self._problem(f"{where}: wrong pixels for {asked.prompt}")

    def _note_file(self, url: str, asked: Asked, by: By | None = None) -> None:
        with self._lock:
            if not url.startswith("data:"):
                self._files[url.rpartition("/")[2]] = asked
            elif by in KEEPING:
                self._orphans += 1

    def _image(self, http: httpx.Client, rng: random.Random) -> str:
        by, asked = rng.choice(APIS), rng.choice(self._cases[0])
        url = by(http, asked)
        self._note_file(url, asked, by)
        self._check(pixels(http, url), asked, by.__name__)
        return by.__name__.replace("_", " ")

    def _edit(self, http: httpx.Client, rng: random.Random) -> str:
        by, asked = rng.choice(EDITING), rng.choice(self._cases[1])
        url = by(http, asked)
        self._note_file(url, asked, by)
        self._check(pixels(http, url), asked, f"edit {by.__name__}")
        return by.__name__.replace("_", " ")

    def _submit(self, http: httpx.Client, rng: random.Random) -> str:
        """Submits a job; repeats that with the same key until the server has answered."""
        asked = rng.choice([*self._cases[0], *self._cases[1]])
        body = asked.fields | {"webhook_url": self._receiver.url}
        body |= {"images": [{"image_url": asked.source}]} if asked.source else {"size": "512x512"}
        key, tries = {"Idempotency-Key": secrets.token_hex(8)}, 0
        while True:
            tries += 1
            began = time.monotonic()
            try:
                answer = http.post(PATH, json=body, headers=key)
                code = answer.status_code
            except httpx.TransportError:
                code = 0
            if code == 202:
                with self._lock:
                    self._jobs[answer.json()["id"]] = Submitted(asked)
                return "accepted" if tries == 1 else "accepted later"
            if not self._is_excused(code, began):
                self._problem(f"submit: {code}")
                return f"failed {code}"
            time.sleep(1)

    def _one_of_the_jobs(self, rng: random.Random) -> str | None:
        with self._lock:
            ids = [one for one, job in self._jobs.items() if job.end == "succeeded"]
        return rng.choice(ids[-20:]) if ids else None

    def _cancel(self, http: httpx.Client, rng: random.Random) -> str:
        if (job_id := self._one_of_the_jobs(rng)) is None:
            return "no job"
        answer = http.delete(f"{PATH}/{job_id}")
        if answer.status_code == 409:
            return "too late"
        if answer.status_code not in (200, 202):
            raise RefusedError(answer)
        with self._lock:
            self._jobs[job_id].end = "cancelled"
        return "cancelled"

    def _purge(self, http: httpx.Client, rng: random.Random) -> str:
        if (job_id := self._one_of_the_jobs(rng)) is None:
            return "no job"
        answer = http.post(f"{PATH}/{job_id}/purge")
        if answer.status_code == 409:
            return "too early"
        if answer.status_code not in (200, 404):
            raise RefusedError(answer)
        with self._lock:
            self._jobs.pop(job_id, None)
        return "purged"

    def _hang_up(self, http: httpx.Client, rng: random.Random) -> str:
        asked = rng.choice(self._cases[0])
        body = asked.fields | {"size": "1024x1024", "stream": rng.random() < 0.5}
        try:
            http.post(
                "/v1/images/generations", json=body, timeout=httpx.Timeout(30, read=rng.uniform(0.05, 2))
            )
        except httpx.ReadTimeout:
            self._give_up()
            return "hung up"
        self._give_up()  # nobody notes its file
        return "too late"

    def _talk_nonsense(self, http: httpx.Client, rng: random.Random) -> str:
        body, code = rng.choice(NONSENSE)
        answer = http.post(
            "/v1/images/generations", content=body, headers={"Content-Type": "application/json"}
        )
        if answer.status_code != code:
            raise RefusedError(answer)
        return "rejected"

    def _settle(self) -> None:
        """Waits until all jobs have ended, and closes the accounts."""
        with self._http() as http:
            until(lambda: self._status(http) == 200)
            for job_id, submitted in self._jobs.items():
                self._settle_job(http, job_id, submitted)
            until(lambda: http.get("/v1/internal/status").json()["status"] == "idle", 600)
            until(lambda: set(self._jobs) <= set(self._delivered()), 300)
            for job_id, types in self._delivered().items():
                if len(types) > 1:
                    self._problem(f"job {job_id} ended as {types}")
            for name, asked in self._files.items():
                self._check(pixels(http, f"/files/{name}"), asked, f"file {name}")
        kept = {file.name: file.stat().st_size for file in (self._folder / "files").iterdir()}
        self.report.files = len(kept), sum(kept.values())
        unknown = set(kept) - set(self._files)
        if len(unknown) > self._orphans:
            self._problem(f"{len(unknown)} files are nobody's, and {self._orphans} requests were given up")
        if temporary := [name for name in kept if name.endswith((".part", ".upload"))]:
            self._problem(f"left over: {temporary}")

    def _settle_job(self, http: httpx.Client, job_id: str, submitted: Submitted) -> None:
        jobs: list[Any] = []

        def has_ended() -> bool:
            jobs[:] = [http.get(f"{PATH}/{job_id}").json()]
            return jobs[0].get("status") in ENDED

        until(has_ended, 600)
        state = jobs[0]["status"]
        self.report.jobs[state] += 1
        if state != submitted.end:
            error = jobs[0].get("error")
            if not (error and error["code"] == "unloaded"):  # the unload aborts running jobs
                self._problem(f"job {job_id} is {state} and not {submitted.end}: {error}")
        for image in (jobs[0].get("result") or {}).get("data", []):
            self._note_file(image["url"], submitted.asked)

    def _delivered(self) -> dict[str, set[str]]:
        """Returns the types of the webhooks of each job."""
        types: dict[str, set[str]] = defaultdict(set)
        for headers, body in list(self._receiver.came):
            types[headers["webhook-id"]].add(body.decode().partition('"type":')[2].split('"')[1])
        return types


def title(process: psutil.Process) -> str:
    """Returns a process's name: `ray::…` without the method that runs, its Python script or its program."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    script = next((word for word in words if word.endswith(".py")), words[0])
    return script.rpartition("/")[2].strip()


def check(report: Report, *, flat: bool) -> None:
    """Raises an AssertionError if something was lost, double or wrong, or if a process has grown.

    Args:
        report: the report of a night.
        flat: whether processes that lived for ten minutes must not have grown: memory by at most 5 %, open
            files and threads by at most 5 % and 4. The files of Ray's log monitor may grow by `LOGS` for
            each other process.
    """
    assert not report.problems
    assert len(report.faults) == FAULTS, "not all faults happened"
    grown = []
    for name, samples in report.processes.items():
        if flat and len(samples.mib) * SAMPLE_S >= 600:
            logs = LOGS * len(report.processes) if name.startswith("log_monitor.py ") else 0
            for what, values, slack in (
                ("MiB", samples.mib, 0),
                ("files", samples.files, 4 + logs),
                ("threads", samples.threads, 4),
            ):
                before, after = report.growth(values)
                if after > before * 1.05 + slack:
                    grown.append(f"{name}: {before:.0f} to {after:.0f} {what}")
    assert not grown, f"processes have grown: {grown}"


def night(folder: Path, *, seconds: float, fault_every_s: float, seed: int) -> Report:
    """Runs a night on a server of its own; returns the report."""
    receiver = Receiver()
    model = tiny_model("glm-image", prior={"max_batch_size": 4})
    with postgresql.running() as database, receiver.receiving():
        config = config_file(
            folder,
            [model],
            outbound={"allow": [receiver.place]},
            database={"url": database.database()},
            storage={
                "url": str(folder / "files"),
                "min_free_bytes": shutil.disk_usage(folder).free - SPARE_BYTES,
            },
        )
        # By default Ray's GCS keeps 100,000 calls. It would grow for hours, and then no more.
        with served(config, RAY_task_events_max_num_task_in_gcs="1000") as running:
            return Night(running, receiver, database, folder, seed).run(seconds, fault_every_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--fault-every", type=float, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="night-") as name:
        report = night(
            Path(name),
            seconds=arguments.seconds,
            fault_every_s=arguments.fault_every,
            seed=arguments.seed,
        )
    report.show()
    check(report, flat=True)


if __name__ == "__main__":
    main()
