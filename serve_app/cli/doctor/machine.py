"""Findings about the machine: versions, memory, disks, GPUs."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import runpy
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from huggingface_hub import constants
from packaging.requirements import Requirement

from deployments.cpus import cpu_limit
from serve_app import __version__
from serve_app.cli import gpus
from serve_app.cli.doctor.findings import fault, fine, program, sized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve_app.cli.doctor.findings import Finding
    from serve_app.cli.gpus import GPU
    from serve_app.config import AppConfig

PROJECT = "glm-image-server"
NAMED = ("ray", "torch", "diffusers", "transformers")
"""Packages whose versions are shown even if they are right."""
MIN_DRIVERS = {13: 580, 12: 525}
"""https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
SHM = Path("/dev/shm")  # noqa: S108 - no file is made
CGROUP_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")
RAY_OBJECTS_SHARE = 0.3
"""Share of the free memory that Ray keeps objects in, by default."""
RAY_MIN_SHM = 10_000_000_000
"""Bytes of objects above which Ray makes do with the shared memory that there is."""
RAY_FREE_SHARE = 0.05
"""Free share of a disk below which Ray writes no objects to it."""


def system() -> Iterator[Finding]:
    """Yields the versions of the server, Python and the operating system."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, LookupError):
        name = platform.system()
    yield fine(
        f"GLM-Image server {__version__}, Python {platform.python_version()}, {name}, "
        f"{platform.system()} {platform.release()} {platform.machine()}"
    )


def packages() -> Iterator[Finding]:
    """Yields the installed packages that are named above, and those that do not fit the project."""
    try:
        required = [Requirement(line) for line in metadata.requires(PROJECT) or ()]
    except metadata.PackageNotFoundError:  # it runs from its folder, as in the container
        required = [Requirement(name) for name in NAMED]
    for one in required:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
        remedy = f"{program('python')} -m pip install '{one.name}{extras}{one.specifier}'"
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield fault(f"{one.name} is not installed", remedy)
            continue
        if not one.specifier.contains(version, prereleases=True):
            yield fault(f"{one.name} {version} is installed, and {one.specifier} is required", remedy)
        elif one.name in NAMED:
            yield fine(f"{one.name} {version}")


def memory() -> Iterator[Finding]:
    """Yields the memory and the CPUs, and the shared memory, in which Ray keeps its objects."""
    total, available = _memory()
    yield fine(f"memory: {sized(available)} of {sized(total)} are free; CPUs: {cpu_limit()}")
    shm = shutil.disk_usage(SHM)
    # As Ray's `resolve_object_store_memory` does.
    wanted = min(available * RAY_OBJECTS_SHARE, max(RAY_MIN_SHM, 0.95 * shm.free))
    text = f"{SHM}: {sized(shm.free)} of {sized(shm.total)} are free; Ray wants {sized(wanted)}"
    if shm.free >= wanted:
        yield fine(text)
    else:
        gigabytes = math.ceil(wanted * 1.1 / 1e9)
        yield fault(
            f"{text}, and keeps its objects on the disk instead, which is slower",
            f"start the container with --shm-size={gigabytes}g, or free {SHM}",
        )


def _memory() -> tuple[int, int]:
    """Returns the total and the free memory of this machine, or of this container if it may have less."""
    found = psutil.virtual_memory()
    limit = CGROUP_MEMORY_MAX.read_text().strip() if CGROUP_MEMORY_MAX.exists() else "max"
    total = found.total if limit == "max" else min(found.total, int(limit))
    return total, min(total, found.available)


def disks() -> Iterator[Finding]:
    """Yields the free space of Ray's folder and of the cache for downloads."""
    parent = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - Ray's
    path = Path(parent, "ray")
    usage = shutil.disk_usage(existing(path))
    text = f"Ray's folder {path}: {sized(usage.free)} of {sized(usage.total)} are free"
    if usage.free < RAY_FREE_SHARE * usage.total:
        yield fault(f"{text}, and Ray writes no objects to a disk that full", "delete files there")
    else:
        yield fine(text)
    yield fine(f"Hugging Face cache {constants.HF_HUB_CACHE}: {sized(free(constants.HF_HUB_CACHE))} are free")


def free(path: str | Path) -> int:
    """Returns the free bytes of the disk on which a folder is, or will be."""
    return shutil.disk_usage(existing(Path(path))).free


def existing(path: Path) -> Path:
    """Returns a path, or the nearest folder above it that exists."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def graphics(config: AppConfig | None) -> Iterator[Finding]:
    """Yields the GPUs, and whether PyTorch, the driver and a configuration fit them.

    Args:
        config: the configuration, if there is one.
    """
    present = gpus.visible()
    yield from _gpus(present)
    wants_gpus = config is not None and any(stage.device == "cuda" for stage in config.stages)
    yield from _torch(present, wants_gpus=wants_gpus)
    if config is None or present is None:
        return
    problem, _, remedy = (config.lacks_gpus(len(present)) or "").partition(". ")
    if problem:
        yield fault(problem, remedy[:1].lower() + remedy[1:].rstrip("."))
    elif wants_gpus:
        yield fine("there are as many GPUs as the configuration asks for")


def _gpus(present: list[GPU] | None) -> Iterator[Finding]:
    if present is None and "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        yield fine("GPUs: CUDA_VISIBLE_DEVICES names parts of GPUs (MIG), which are not examined")
    elif present is None:
        yield fault("GPUs: NVIDIA's driver does not answer", "run `nvidia-smi`, and do as it says")
    elif not present:
        yield fine("GPUs: none")
    for gpu in present or ():
        room = f"{sized(gpu.free)} of {sized(gpu.total)} are free" if gpu.total else "memory unknown"
        yield fine(f"GPU {gpu.index}: {gpu.name}, {room}, driver {gpu.driver}")


def _torch(present: list[GPU] | None, *, wants_gpus: bool) -> Iterator[Finding]:
    """Yields for which CUDA PyTorch is built, and whether the driver is new enough for it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return  # reported with the packages
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cuda, version = built["cuda"], metadata.version("torch").partition("+")[0]
    if cuda is None:
        text = "torch is built for CPUs"
        if wants_gpus:
            pip = f"{program('python')} -m pip"
            remedy = f"{pip} uninstall --yes torch && {pip} install torch=={version}"
            yield fault(f"{text}, and the configuration has stages with device: cuda", remedy)
        else:
            yield fine(f"{text}, and does not use the GPUs" if present else text)
        return
    text = f"torch is built for CUDA {cuda}"
    needed = MIN_DRIVERS.get(_major(cuda), 0)
    driver = min((gpu.driver for gpu in present or ()), key=_major, default="")
    if driver and _major(driver) < needed:
        yield fault(f"{text}, and the driver is {driver}", f"install NVIDIA's driver {needed} or newer")
    else:
        yield fine(text)


def _major(version: str) -> int:
    return int(version.partition(".")[0])
