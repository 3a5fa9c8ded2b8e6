from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from deployments.cpus import cpu_limit

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("400000 100000", 4),
        ("50000 100000", 1),
        ("250000 100000", 2),
        ("max 100000", 32),
        ("9900000 100000", 32),
    ],
)
def test_the_quota_of_the_container_bounds_the_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text(f"{quota}\n")
    assert cpu_limit(cpu_max) == cpus
    assert cpu_limit(tmp_path / "missing") == 32
