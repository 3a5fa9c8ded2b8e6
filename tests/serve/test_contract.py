"""What openapi.json says is what happens: schemathesis asks everything that it allows, and what it does not.

https://schemathesis.readthedocs.io, with all its checks. The limits are such that a CPU makes all the images.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import ROOT, Running, config_file, served, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KEY = "the-key"
SEED = 20261121
CASES = 200
"""Of each operation, where there are so many."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    model = tiny_model("m", prior={"min_replicas": 1}, decoder={"min_replicas": 1})
    model["defaults"] = {"width": 512, "height": 512, "steps": 2}
    limits = {"max_pixels": 512 * 512, "max_steps": 2, "max_images": 2}
    auth = {"api_keys": [{"id": "contract", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}
    outbound = {"allow": ["127.0.0.1:9"]}
    with served(config_file(tmp_path, [model], limits=limits, auth=auth, outbound=outbound)) as running:
        yield running


def test_every_answer_is_a_declared_one(running: Running, tmp_path: Path) -> None:
    address = f"{running.url}/openapi.json"
    operations = sum(map(len, httpx.get(address).json()["paths"].values()))
    what = ["--checks=all", "--phases=examples,coverage,fuzzing", f"--max-examples={CASES}"]
    run = subprocess.run(
        [
            ROOT / ".venv/bin/schemathesis",
            *("run", address, *what, f"--seed={SEED}", "--request-timeout=60", "--max-response-time=60"),
            *("-H", f"Authorization: Bearer {KEY}"),
        ],
        cwd=tmp_path,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.serve.contract_hooks", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Tested: {operations}" in run.stdout
    counts = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert counts, run.stdout
    assert int(counts[1]) > 2 * CASES
    with httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a boat"})
    assert answer.status_code == 200
