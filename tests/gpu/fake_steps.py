"""Steps that fail, for the tests of the window. They need no torch."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from tests.gpu.plan import Step

if TYPE_CHECKING:
    from tests.gpu.rows import Run


def step(name: str, limit_s: float = 60) -> Step:
    """Returns a step that runs the function of this name."""
    return Step(name=name, target=f"{__name__}:{name}", limit_s=limit_s)


def works(run: Run) -> None:
    run.emit("before", value=1 / 3, nothing=float("nan"))
    print("output of a library")
    with run.figure("fails", kind="one") as values:
        values["part"] = 1
        raise RuntimeError("no such kernel")
    run.emit("after")


def crashes(run: Run) -> None:
    run.emit("before")
    raise MemoryError("out of memory")


def waits_for_the_other(run: Run) -> None:
    """Runs until another step has begun."""
    run.emit("before")
    end = time.monotonic() + 30
    while len(run.rows.read()) < 2:
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def hangs(run: Run) -> None:
    run.emit("before")
    child = subprocess.Popen(["sleep", "600"])
    run.emit("a process of its own", pid=child.pid)
    time.sleep(600)
