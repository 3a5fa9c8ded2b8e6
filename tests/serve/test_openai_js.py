"""The official `openai` package for JavaScript, unmodified; see js/openai.test.js."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Guarded

FOLDER = Path(__file__).parent / "js"

pytestmark = pytest.mark.skipif(
    not shutil.which("node") or not (FOLDER / "node_modules").exists(),
    reason="Debian's nodejs and npm are missing",
)


def test_the_javascript_client_works(guarded: Guarded) -> None:
    guarded.use_up_other_key()
    run = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "openai.test.js"],
        cwd=FOLDER,
        env=os.environ | {"BASE_URL": guarded.url, "KEY": guarded.key, "SPENT_KEY": guarded.other_key},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "# pass 10" in run.stdout
