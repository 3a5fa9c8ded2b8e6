"""Responses match openapi.json. Schemathesis sends requests that the document allows, and others.

https://schemathesis.readthedocs.io, with all its checks. The stages are stand-ins.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.conftest import ROOT, Endpoint, keys, served

pytestmark = pytest.mark.timeout(3600)
CASES = 40
SEED = 20261121
VENDOR_IDS = "^(fal_(run|submit)_|zai_(async_)?generations|pixazo_(submit|status_by_post))"
"""Operations with the vendors' own bounds. The server's limits reject most of what these allow."""


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    limits = {"max_pixels": 512 * 512, "max_steps": 2, "max_images": 2}
    defaults = {"width": 512, "height": 512, "steps": 2}
    outbound = {"allow": ["127.0.0.1:9"]}
    with served(tmp_path, "m", defaults=defaults, limits=limits, auth=keys(), outbound=outbound) as endpoint:
        yield endpoint


def schemathesis(endpoint: Endpoint, folder: Path, cases: int, *options: str) -> str:
    """Runs schemathesis, checks that it finds no problem, and returns its output."""
    run = subprocess.run(
        [
            ROOT / ".venv/bin/schemathesis",
            *("run", f"{endpoint.url}/openapi.json", *options, f"--max-examples={cases}"),
            *("--phases=examples,coverage,fuzzing", f"--seed={SEED}"),
            *(
                "--request-timeout=60",
                "--max-response-time=60",
                "-H",
                f"Authorization: Bearer {endpoint.key}",
            ),
        ],
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.http.contract_hooks", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_every_response_matches_the_openapi_document(endpoint: Endpoint, tmp_path: Path) -> None:
    """Sends up to `CASES` generated requests to each operation."""
    paths = httpx.get(f"{endpoint.url}/openapi.json").json()["paths"]
    ids = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    generating = [one for one in ids if re.match(VENDOR_IDS, one)]
    assert len(generating) == 9
    printed = schemathesis(
        endpoint, tmp_path, CASES, "--checks=all", f"--exclude-operation-id-regex={VENDOR_IDS}"
    )
    assert f"Tested: {len(ids) - len(generating)}" in printed
    counts = re.search(r"(\d+) generated, (\d+) passed", printed)
    assert counts, printed
    assert int(counts[1]) > 2 * CASES
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    only = f"--include-operation-id-regex={VENDOR_IDS}"
    assert f"Tested: {len(generating)}" in schemathesis(
        endpoint, tmp_path, CASES // 4, f"--checks={checks}", only
    )
    with httpx.Client(
        base_url=endpoint.url, headers={"Authorization": f"Bearer {endpoint.key}"}, timeout=60
    ) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a boat"})
    assert answer.status_code == 200
