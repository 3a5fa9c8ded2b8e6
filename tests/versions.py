"""Runs the tests of the model families on other versions of the libraries, and prints a table.

The locked environment stays as it is. The other versions lie in a folder before it. `make versions`
runs this, or:

    python -m tests.versions transformers==5.20.0 ...
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = ("tests/unit/deployments/families", "tests/unit/deployments/helpers")
VERSIONS = ("transformers==5.17.0", "transformers==5.18.0", "transformers==5.24.0")


def main() -> None:
    """Runs the tests once for each version."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="requirements as of pip")
    python = ".".join(map(str, sys.version_info[:2]))
    print(
        f"| Python {python}, torch {version('torch')}, diffusers {version('diffusers')} | Tests |\n|---|---|"
    )
    results = [_run(requirement) for requirement in parser.parse_args().versions]
    sys.exit(any(results))


def _run(requirement: str) -> int:
    """Prints the row of a version; returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, requirement)
        subprocess.run([sys.executable, *install], check=True)
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *SUITE],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    (*lines, last) = tests.stdout.splitlines()
    print(f"| {requirement} | {re.sub(r' in .*', '', last)} |", flush=True)
    if tests.returncode:
        print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), file=sys.stderr)
    return tests.returncode


if __name__ == "__main__":
    main()
