"""What openapi.json says is what happens: schemathesis asks everything that it allows, and what it does not.

https://schemathesis.readthedocs.io. The limits are such that a CPU makes the images in time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from PIL import Image

from tests.serve.conftest import Running, config_file, served, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
KEY = "a key for the contract"
SEED = 20261121
CASES = 300


def pictures() -> st.SearchStrategy[bytes]:
    """Images that an edit takes."""

    def file(kind: str, shade: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(file, kind)
        return file.getvalue()

    return st.builds(file, st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 255))


schemathesis.openapi.format("binary", pictures())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("contract")
    model = tiny_model("m", prior={"min_replicas": 1}, decoder={"min_replicas": 1})
    model["defaults"] = {"width": 512, "height": 512, "steps": 2}
    limits = {"max_pixels": 512 * 512, "max_steps": 2, "max_images": 2}
    auth = {"api_keys": [{"id": "contract", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}
    with served(config_file(folder, [model], limits=limits, auth=auth)) as running:
        yield running


@pytest.fixture(scope="module")
def document(running: Running) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@seed(SEED)
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_every_answer_is_a_declared_one(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
