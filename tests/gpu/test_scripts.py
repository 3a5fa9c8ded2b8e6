"""Tests of the GPU scripts, on the CPU at tiny sizes, and of the window when steps fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu import fake_steps, window
from tests.gpu.plan import STEPS, Step
from tests.gpu.rows import FIGURES
from tests.gpu.table import FIGURES as FIGURES_OF_H200
from tests.gpu.table import Figures, table

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]


def rows_of(out: Path) -> list[Row]:
    file = out / FIGURES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[Row]]:
    """Function that runs steps and returns their rows, which the file and standard output share."""

    def run(steps: Sequence[Step], limit_s: float = 60, min_step_s: float = 1) -> list[Row]:
        window.run(steps, window.Options(out=tmp_path, limit_s=limit_s, min_step_s=min_step_s))
        rows = rows_of(tmp_path)
        assert rows == [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        return rows

    return run


def in_short(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row["step"], row.get("figure") or row["end"]) for row in rows]


def test_a_figure_that_fails_does_not_affect_others(run: Callable[..., list[Row]], tmp_path: Path) -> None:
    before, fails, _, end = rows = run([fake_steps.step("works")])
    assert in_short(rows) == [
        (fake_steps.works.__name__, name) for name in ("before", "fails", "after", "done")
    ]
    assert before["value"] == 0.3333
    assert before["nothing"] is None
    assert (fails["kind"], fails["part"], fails["error"]) == ("one", 1, "RuntimeError: no such kernel")
    assert "error" not in end
    log = (tmp_path / "log").read_text()
    assert "output of a library" in log
    assert "Traceback" in log


def test_a_step_that_crashes_does_not_affect_others(run: Callable[..., list[Row]]) -> None:
    missing = Step(name="missing", target="tests.gpu.no_such_module:step", limit_s=60)
    rows = run([fake_steps.step("crashes"), missing, fake_steps.step("works")])
    assert in_short(rows)[:4] == [
        ("crashes", "before"),
        ("crashes", "failed with status 1"),
        ("missing", "failed with status 1"),
        ("works", "before"),
    ]
    assert "MemoryError: out of memory" in rows[1]["error"]
    assert "No module named 'tests.gpu.no_such_module'" in rows[2]["error"]
    assert rows[-1]["end"] == "done"


def test_a_step_that_hangs_is_stopped_with_all_its_processes(run: Callable[..., list[Row]]) -> None:
    rows = run([fake_steps.step("hangs", limit_s=4), fake_steps.step("works")])
    assert in_short(rows)[:4] == [
        ("hangs", "before"),
        ("hangs", "a process of its own"),
        ("hangs", "stopped"),
        ("works", "before"),
    ]
    assert 4 <= rows[2]["seconds"] < 10
    assert "in hangs" in rows[2]["error"]  # the stack of the hanging step
    assert is_gone(rows[1]["pid"])
    assert rows[-1]["end"] == "done"


def test_steps_of_a_group_run_at_the_same_time(run: Callable[..., list[Row]]) -> None:
    waits = fake_steps.step("waits_for_the_other")
    rows = run([waits, replace(waits, name="other", beside=waits.name), fake_steps.step("works")])
    assert [row["end"] for row in rows if "end" in row] == ["done"] * 3
    assert not [row for row in rows[:4] if "error" in row]


def test_steps_are_skipped_when_time_runs_out(run: Callable[..., list[Row]]) -> None:
    rows = run(
        [fake_steps.step("hangs"), fake_steps.step("works"), fake_steps.step("crashes")],
        limit_s=4,
        min_step_s=3,
    )
    assert in_short(rows)[2:] == [("hangs", "stopped"), ("works", "skipped"), ("crashes", "skipped")]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_window_that_is_killed_keeps_its_rows_and_leaves_no_process(
    by: signal.Signals, tmp_path: Path
) -> None:
    code = (
        "import signal; from pathlib import Path; from tests.gpu import fake_steps, window\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be ignored in the background
        "window.run([fake_steps.step('hangs'), fake_steps.step('works')],"
        f" window.Options(out=Path({str(tmp_path)!r})))"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(rows_of(tmp_path)) == 2)
    family = psutil.Process(killed.pid).children(recursive=True)
    steps = [process for process in family if "tests.gpu.child" in process.cmdline()]
    assert len(steps) == 2  # the next step is being prepared
    os.kill(killed.pid, by)
    killed.communicate(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=20)  # including processes that a step has started
    assert not alive
    assert in_short(rows_of(tmp_path)) == [("hangs", "before"), ("hangs", "a process of its own")]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of the whole window at tiny sizes on the CPU."""
    out = tmp_path_factory.mktemp("window")
    command = [sys.executable, "-m", "tests.gpu.window", "--device", "cpu", "--tiny", "--limit", "1500"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert rows == [json.loads(line) for line in done.stdout.splitlines()]
    return rows


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_every_step_is_done(whole: list[Row]) -> None:
    assert [(row["step"], row["end"]) for row in whole if "end" in row] == [
        (step.name, "done") for step in STEPS
    ]
    assert [row for row in whole if "error" in row] == []
    assert {row["skipped"] for row in whole if "skipped" in row} == {"needs a GPU"}


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_a_seed_has_the_same_bytes_in_every_process(whole: list[Row]) -> None:
    same = [row["same"] for row in whole if "same" in row]
    assert len(same) == 3
    assert all(same)
    assert [row["same_again"] for row in whole if "same_again" in row] == [True, True]


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_the_whole_server(whole: list[Row]) -> None:
    values = {
        row["figure"].removeprefix("server, "): row.get("value", "")
        for row in whole
        if row["step"] == "server" and "figure" in row
    }
    digests = {name: value.split()[-1] for name, value in values.items() if re.search(r" s, \w{12}$", value)}
    first, warm, again, killed, undisturbed = digests.values()
    assert first == warm == again != killed == undisturbed
    (idle,) = (name for name in values if name.startswith("idle for"))
    assert idle.endswith("unloaded")
    assert values[idle] == "nothing in use, by processes: none"


def test_the_readme_has_the_figures_of_the_last_window() -> None:
    assert table(Figures(FIGURES_OF_H200)) in (ROOT / "docs/explained/performance.md").read_text()
