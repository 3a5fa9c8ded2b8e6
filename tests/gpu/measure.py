"""Times, memory and digests of what runs on the device."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deployments.engines import compilation
from tests.gpu.rows import NEEDS_GPU

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tests.gpu.rows import Run

Result = TypeVar("Result")

TOP_KERNELS = 14
"""Kernels of a profile that become part of its row."""


def prepare(run: Run) -> torch.device:
    """Sets up a step's process as a stage's is; returns the device."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if not run.on_gpu:
        torch.set_num_threads(1)
    if not run.compiled:
        torch.compiler.set_stance("force_eager")
    compilation.prepare(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))
    return torch.device(run.device)


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Returns a call's result and its seconds, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - began


def milliseconds(call: Callable[[], object], device: torch.device, *, runs: int = 20, warm: int = 3) -> float:
    """Returns the median milliseconds of a call, on a GPU by its own clock."""
    for _ in range(warm):
        call()
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(call, device)[1] for _ in range(min(runs, 3)))
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in spans:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    taken: float = statistics.median(begin.elapsed_time(end) for begin, end in spans)
    return taken


def kernels(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Returns where the device's time goes in one call: on a GPU by kernel, else by operator."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize(device)
    with profile(activities=activities) as profiled:
        call()
        synchronize(device)
    microseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiled.events() or ():
        # Compiled code marks regions, which would be counted beside the kernels in them.
        if (
            event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
            and not event.is_user_annotation
        ):
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            microseconds[event.name] += spent
            launches[event.name] += 1
    top = [
        [name[:70], launches[name], round(spent, 1)] for name, spent in microseconds.most_common(TOP_KERNELS)
    ]
    return {
        "launches": launches.total(),
        "total_us": sum(microseconds.values()),
        "top": top,
        "columns": "name, launches, microseconds",
    }


def free(device: torch.device) -> None:
    """Returns memory that nothing uses any more to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Memory:
    """The device's memory from now on: what is allocated, and the most that was at once."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        synchronize(device)
        self._before = self.allocated()
        self.restart()

    def allocated(self) -> int:
        """Returns the bytes that are allocated now; on a CPU none."""
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def restart(self) -> int:
        """Returns the most bytes so far beside those of the beginning, and forgets them."""
        if not self._on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak - self._before

    def held(self) -> int:
        """Returns the bytes that are allocated now beside those of the beginning."""
        return self.allocated() - self._before

    def values(self) -> dict[str, Any]:
        """Returns the fields of a row: gigabytes at the beginning, at most, and the difference."""
        if not self._on_gpu:
            return {"memory": NEEDS_GPU}
        peak = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        return {
            "before_gb": self._before / 1e9,
            "peak_gb": peak / 1e9,
            "beside_gb": (peak - self._before) / 1e9,
            "reserved_gb": torch.cuda.memory_reserved() / 1e9,
            "in_use_on_device_gb": (total - free) / 1e9,
        }


def clocks(device: torch.device) -> dict[str, str]:
    """Returns what the driver's tool says of the first GPU; nothing where there is no such tool."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(
        zip(fields.split(","), (value.strip() for value in answer.splitlines()[0].split(",")), strict=True)
    )


def digest(array: NDArray[Any]) -> str:
    """Returns the first digits of an array's digest."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def graphs() -> dict[str, int]:
    """Returns how many graphs this process has compiled, and how many of them came from the cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "from_cache": counters["inductor"]["fxgraph_cache_hit"],
    }
