"""The NVIDIA GPUs of this machine, read without loading PyTorch or Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

QUERY = "index,uuid,name,memory.total,memory.free,driver_version"
TIMEOUT_S = 30


@dataclass(frozen=True)
class GPU:
    """A GPU. Memory is in bytes."""

    index: str
    uuid: str
    name: str
    total: int
    free: int
    driver: str


def visible() -> list[GPU] | None:
    """Returns the GPUs that `CUDA_VISIBLE_DEVICES` leaves; None if the driver does not answer.

    A machine without NVIDIA's `nvidia-smi` has none. If the variable names parts of GPUs (MIG), this returns
    None too: only CUDA knows them.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen and "MIG-" in chosen:
        return None
    program = shutil.which("nvidia-smi")
    if chosen in ("", "-1", "NoDevFiles") or not program:
        return []
    try:
        run = subprocess.run(  # noqa: S603 - no input
            [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = [_parse(line) for line in run.stdout.splitlines() if line.count(",") == QUERY.count(",")]
    if chosen is None:
        return gpus
    names = [name.strip() for name in chosen.split(",")]
    return [gpu for gpu in gpus if any(gpu.index == name or gpu.uuid.startswith(name) for name in names)]


def _parse(line: str) -> GPU:
    index, uuid, name, total, free, driver = (field.strip() for field in line.split(","))
    return GPU(index, uuid, name, _bytes(total), _bytes(free), driver)


def _bytes(mebibytes: str) -> int:
    """Returns the bytes of a number of MiB; 0 where the driver says that it is not available."""
    return int(mebibytes) * 2**20 if mebibytes.isdigit() else 0
