"""The process of one step of the window; `tests.gpu.window` starts it.

It imports the step's module. Then it reads the step's time limit, in seconds, from its standard input. The
next step therefore imports its modules while the previous one runs.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from tests.gpu.rows import Rows, Run

STACKS_BEFORE_S = 2
"""Seconds before the limit at which a step that hangs writes the stacks of its threads to the log."""


def main() -> int:
    """Runs the step; returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    stream = os.dup(1)
    os.dup2(2, 1)  # output of libraries goes to the log
    module, function = options.target.split(":")
    failure = None
    try:
        run_step = getattr(importlib.import_module(module), function)
    except Exception:  # noqa: BLE001 - reported when the step begins
        failure = traceback.format_exc()
    limit = float(os.read(0, 64) or sys.exit("the window ended before this step"))
    threading.Thread(target=_end_with_the_window, daemon=True).start()
    if failure:
        sys.stderr.write(failure)
        return 1
    faulthandler.dump_traceback_later(max(limit - STACKS_BEFORE_S, limit / 2))
    rows = Rows(out=options.out, began=options.began, stream=stream)
    run_step(
        Run(
            step=options.name,
            rows=rows,
            device=options.device,
            tiny=options.tiny,
            compiled=options.compiled,
            limit_s=limit,
        )
    )
    return 0


def _end_with_the_window() -> None:
    """Ends this process when the window's process has died, which closes the pipe.

    Terminates the processes that the step has started too. An interrupt would not do: a shell that starts the
    window in the background lets all its processes ignore it.
    """
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)  # the window has given this process a group of its own
    os._exit(1)


if __name__ == "__main__":
    try:
        status = main()
    except BaseException:  # noqa: BLE001 - `os._exit` ends the process below
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # no destructors: they may hang on a device that is lost
