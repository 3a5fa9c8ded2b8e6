"""The machine's GPUs, by a stand-in for `nvidia-smi`."""

from pathlib import Path

import pytest

from serve_app.cli import gpus

SMI = """#!/bin/sh
cat <<'END'
0, GPU-1a, NVIDIA H100 80GB HBM3, 81559, 81000, 580.65
1, GPU-2b, NVIDIA GeForce RTX 4090, 24564, [N/A], 580.65
END
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nvidia-smi"
    file.write_text(SMI)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return file


@pytest.mark.usefixtures("smi")
def test_gpus_have_a_name_and_memory() -> None:
    first, second = gpus.visible() or []
    assert (first.name, first.total, first.free) == ("NVIDIA H100 80GB HBM3", 81559 * 2**20, 81000 * 2**20)
    assert (second.free, second.driver) == (0, "580.65")


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize(
    ("chosen", "indexes"),
    [("1", ["1"]), ("0,1", ["0", "1"]), ("GPU-1a", ["0"]), ("", []), ("-1", []), ("7", [])],
)
def test_cuda_visible_devices_is_respected(
    monkeypatch: pytest.MonkeyPatch, chosen: str, indexes: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu.index for gpu in gpus.visible() or []] == indexes


@pytest.mark.usefixtures("smi")
def test_parts_of_gpus_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a2b")
    assert gpus.visible() is None


def test_a_failing_driver_is_unknown(smi: Path) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.visible() is None


def test_a_machine_without_the_program_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible() == []
