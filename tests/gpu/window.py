"""Measures the figures of a GPU, the most valuable first, and ends after eight minutes.

    python -m tests.gpu.window [--out FOLDER] [--limit SECONDS] [--steps probe,prior,…]

Every figure is a JSON object on one line, on standard output and in FOLDER/figures.jsonl. Every step is a
process with a time limit. Its figures are kept if it fails or is stopped.
`--device cpu --tiny` tries the script without a GPU.

`tests/gpu/README.md` describes the requirements and the figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.plan import STEPS, Step, groups
from tests.gpu.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
MIN_STEP_S = 10.0
"""Seconds below which a step is skipped."""
CPU_FACTOR = 4
"""Factor of the time limits on a CPU, where a run only shows whether the script works."""
LOG_CHARS = 1200
"""Characters of the log in the row of a step that failed or was stopped."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a window.

    Attributes:
        out: folder for the figures and the log.
        limit_s: seconds until the last step is stopped.
        device: `cuda` or `cpu`.
        tiny: whether models and images are tiny.
        compiled: whether code is compiled in tiny runs too.
        min_step_s: seconds below which a step is skipped.
    """

    out: Path
    limit_s: float = 480
    device: str = "cuda"
    tiny: bool = False
    compiled: bool = False
    min_step_s: float = MIN_STEP_S


class Child:
    """The process of one step. It imports its modules immediately, and runs after `begin`.

    Args:
        step: step that it runs.
        options: options of the window.
        began: start of the window.
        caches: folder of the caches of compiled code.
    """

    def __init__(self, step: Step, options: Options, began: float, caches: Path) -> None:
        self._log = options.out / "log"
        command = [sys.executable, "-m", "tests.gpu.child", step.name, step.target]
        command += ["--out", str(options.out), "--began", str(began), "--device", options.device]
        command += ["--tiny"] * options.tiny + ["--compiled"] * (options.compiled or not options.tiny)
        cache = caches / (step.name if step.fresh_cache else "shared")
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                bufsize=0,
                stderr=log,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"},
                process_group=0,  # so that its children end with it
            )
        self._log_start = 0
        self._is_over = False

    def begin(self, limit_s: float) -> None:
        """Starts the step. The process uses the limit to write its stacks before it is stopped."""
        self._log_start = self._log.stat().st_size
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has died; `wait` reports its status
            self._process.stdin.write(f"{limit_s}\n".encode())

    def wait(self, until: float) -> str:
        """Waits for the process until a time of `time.monotonic`, and returns how it ended."""
        try:
            status = self._process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            self.kill()
        return "done" if status == 0 else f"failed with status {status}"

    def kill(self) -> None:
        """Kills the process and its remaining children."""
        if self._is_over:  # its process id may be reused
            return
        self._is_over = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def log(self) -> str:
        """Returns the end of the step's log."""
        return self._log.read_bytes()[self._log_start :].decode(errors="replace")[-LOG_CHARS:]


def run(steps: Sequence[Step], options: Options) -> None:
    """Runs the steps in order, and writes how each ended."""
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(out=options.out, began=began)
    caches = Path(tempfile.mkdtemp(prefix="window-"))
    children: list[Child] = []

    def start(group: list[Step]) -> list[Child]:
        started = [Child(step, options, began, caches) for step in group]
        children.extend(started)
        return started

    try:
        following: list[Child] = []
        grouped = groups(steps)
        for index, group in enumerate(grouped):
            left = options.limit_s - (time.monotonic() - began)
            if left < options.min_step_s:
                for step in group:
                    rows.write(step=step.name, end="skipped", error="no time was left")
                continue
            current = following or start(group)
            started = time.monotonic()
            factor = CPU_FACTOR if options.device == "cpu" else 1
            limits = [min(factor * step.limit_s, left) for step in group]
            for child, limit in zip(current, limits, strict=True):
                child.begin(limit)
            following = start(grouped[index + 1]) if index + 1 < len(grouped) else []
            for step, child, limit in zip(group, current, limits, strict=True):
                end = child.wait(started + limit)
                problem = {} if end == "done" else {"limit_s": limit, "error": child.log()}
                rows.write(step=step.name, end=end, seconds=time.monotonic() - started, **problem)
    finally:
        for child in children:
            child.kill()
        shutil.rmtree(caches, ignore_errors=True)


def main() -> None:
    """Parses the command line, and runs the chosen steps."""
    known = {step.name: step for step in STEPS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("window"), help="folder for figures.jsonl and log")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all steps together")
    parser.add_argument(
        "--steps", default=",".join(known), help="comma-separated steps, in the order in which they run"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to try the script")
    parser.add_argument(
        "--compiled", action="store_true", help="compile tiny models too (minutes, needs g++)"
    )
    options = parser.parse_args()
    names = options.steps.split(",")
    if unknown := set(names) - known.keys():
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    run(
        [known[name] for name in names],
        Options(
            out=options.out.absolute(),
            limit_s=options.limit,
            device=options.device,
            tiny=options.tiny,
            compiled=options.compiled,
        ),
    )


if __name__ == "__main__":
    main()
