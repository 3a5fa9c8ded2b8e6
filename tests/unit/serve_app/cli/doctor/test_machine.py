"""The machine: versions, memory, disks and GPUs, by stand-ins for the machine."""

import os
import runpy
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli import gpus
from serve_app.cli.doctor import machine
from serve_app.cli.doctor.findings import Finding
from serve_app.cli.gpus import GPU
from serve_app.config import AppConfig

Usage = namedtuple("Usage", "total used free")


def gpu(driver: str) -> GPU:
    return GPU("0", "GPU-1a", "NVIDIA H100", 80 * 10**9, 79 * 10**9, driver)


def config(device: str) -> AppConfig:
    options = {"ray_actor_options": {"num_gpus": 1}} if device == "cuda" else {}
    stage = {"device": device, "deployment": options}
    model = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": stage, "decoder": stage}
    return AppConfig.model_validate({"models": [model], "auth": {"open": True}})


def disks_with(monkeypatch: pytest.MonkeyPatch, *, total: float, free: float) -> None:
    usage = Usage(int(total), int(total - free), int(free))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def graphics(
    monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, present: list[GPU] | None, device: str = "cpu"
) -> list[Finding]:
    monkeypatch.setattr(runpy, "run_path", lambda _: {"cuda": cuda})
    monkeypatch.setattr(gpus, "visible", lambda: present)
    return list(machine.graphics(config(device)))


def faults(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if not finding.ok]


def test_versions_of_the_machine_are_shown() -> None:
    (finding,) = machine.system()
    assert "GLM-Image server" in finding.text
    assert "Python 3." in finding.text


def test_installed_packages_fit_the_project() -> None:
    findings = list(machine.packages())
    assert not faults(findings)
    assert {finding.text.partition(" ")[0] for finding in findings} == set(machine.NAMED)


def test_packages_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["ray[serve]==1.*", "no-such-package>=2", "numpy>=1", "pytest==1; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda _: required)
    ray, missing = machine.packages()
    assert ray.text == f"ray {metadata.version('ray')} is installed, and ==1.* is required"
    assert ray.remedy.endswith("python -m pip install 'ray[serve]==1.*'")
    assert missing.text == "no-such-package is not installed"


def test_a_server_that_is_not_installed_shows_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROJECT", "no-such-project")
    findings = list(machine.packages())
    assert [finding.text.partition(" ")[0] for finding in findings] == list(machine.NAMED)
    assert not faults(findings)


def test_too_little_shared_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_memory", lambda: (32 * 10**9, 30 * 10**9))
    disks_with(monkeypatch, total=64e6, free=64e6)
    memory, shm = machine.memory()
    assert memory.text.startswith("memory: 30.0 GB of 32.0 GB are free")
    assert ": 64.0 MB of 64.0 MB are free; Ray wants 9.0 GB, and" in shm.text
    assert "--shm-size=10g" in shm.remedy
    disks_with(monkeypatch, total=16e9, free=10e9)
    assert not faults(list(machine.memory()))


def test_ray_makes_do_with_the_shared_memory_of_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_memory", lambda: (10**12, 10**12))
    disks_with(monkeypatch, total=64e9, free=64e9)
    assert not faults(list(machine.memory()))


@pytest.mark.parametrize(("limit", "is_less"), [("1000\n", True), ("max\n", False)])
def test_a_container_may_have_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, is_less: bool
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(machine, "CGROUP_MEMORY_MAX", tmp_path / "memory.max")
    memory, _ = machine.memory()
    assert ("1.0 KB are free" in memory.text) is is_less


def test_a_full_disk_of_ray_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    disks_with(monkeypatch, total=100e9, free=4e9)
    ray, cache = machine.disks()
    assert not ray.ok
    assert ray.text.startswith(f"Ray's folder {tmp_path}/ray: 4.0 GB of 100.0 GB are free")
    assert cache.ok
    disks_with(monkeypatch, total=100e9, free=6e9)
    assert not faults(list(machine.disks()))


@pytest.mark.parametrize(
    ("cuda", "driver", "problem"),
    [
        ("13.0", "580.65.06", None),
        ("13.2", "575.1", "torch is built for CUDA 13.2, and the driver is 575.1"),
        ("12.8", "525.60", None),
        ("12.8", "470.1", "torch is built for CUDA 12.8, and the driver is 470.1"),
        ("99.0", "1.0", None),
    ],
)
def test_the_driver_has_to_be_new_enough(
    monkeypatch: pytest.MonkeyPatch, cuda: str, driver: str, problem: str | None
) -> None:
    found = graphics(monkeypatch, cuda=cuda, present=[gpu("600.1"), gpu(driver)])
    assert faults(found) == ([problem] if problem else [])
    assert found[0].text == "GPU 0: NVIDIA H100, 79.0 GB of 80.0 GB are free, driver 600.1"


def test_a_build_for_cpus_is_a_fault_where_gpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    present = [gpu("580.1"), gpu("580.1")]
    assert not faults(graphics(monkeypatch, cuda=None, present=present))
    (problem,) = faults(graphics(monkeypatch, cuda=None, present=present, device="cuda"))
    assert "device: cuda" in problem
    assert not faults(graphics(monkeypatch, cuda="13.0", present=present, device="cuda"))


def test_too_few_gpus_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    found = graphics(monkeypatch, cuda="13.0", present=[], device="cuda")
    assert faults(found) == ["The configuration asks for 2 GPUs, and there are 0"]
    assert found[-1].remedy.startswith("choose another configuration")


def test_a_driver_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = faults(graphics(monkeypatch, cuda="13.0", present=None, device="cuda"))
    assert "does not answer" in problem
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "MIG-1a")
    assert not faults(graphics(monkeypatch, cuda="13.0", present=None, device="cuda"))


def test_the_installed_torch_names_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def shown(*_: Any) -> list[GPU]:
        return []

    monkeypatch.setattr(gpus, "visible", shown)
    finding = list(machine.graphics(None))[-1]
    cuda = torch.version.cuda
    assert finding.text == (f"torch is built for CUDA {cuda}" if cuda else "torch is built for CPUs")
