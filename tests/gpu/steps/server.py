"""The whole server with both stages on one GPU; see `tests.gpu.server`."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from tests.gpu.window import ROOT

if TYPE_CHECKING:
    from tests.gpu.rows import Run


STOP_S = 30
"""Seconds before the step's limit at which the script is interrupted, so that it can stop the server."""


def server(run: Run) -> None:
    """Runs the script, and writes each line of its output as a row."""
    if importlib.util.find_spec("ray") is None:
        run.emit("server", skipped="needs Ray")
        return
    preset, side, steps = ("tiny", "512", "60") if run.tiny else ("benchmark", "1024", "100")
    command = [sys.executable, "-m", "tests.gpu.server", "--device", run.device, "--preset", preset]
    with (
        run.figure("server") as values,
        subprocess.Popen(
            [*command, "--side", side, "--steps", steps], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as script,
    ):
        timer = threading.Timer(max(1, run.limit_s - STOP_S), script.send_signal, [signal.SIGINT])
        timer.daemon = True
        timer.start()
        assert script.stdout is not None
        for line in script.stdout:
            name, _, value = line.strip().partition(": ")
            run.emit(f"server, {name}", value=value)
        values["status"] = script.wait()
        timer.cancel()
        if script.returncode:
            raise RuntimeError("tests.gpu.server has failed; see the log")
