"""Runs the tests of JavaScript clients with Node's own test runner."""

import os
import re
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "js"


def passed(file: str, tests: int, **environment: str) -> str:
    """Runs a file with this number of tests, checks that all pass, and returns the output."""
    run = subprocess.run(
        ["node", "--test", "--test-reporter=tap", file],
        cwd=FOLDER,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(rf"^# pass {tests}$", run.stdout, re.MULTILINE), run.stdout
    return run.stdout
