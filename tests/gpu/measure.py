"""Times, memory and digests of work on the device."""

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
"""Number of kernels of a profile that its row lists."""


def prepare(run: Run) -> torch.device:
    """Prepares a step's process like a stage's, and returns the device."""
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
    """Returns a call's result and its seconds, including the device's work."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - began


def milliseconds(call: Callable[[], object], device: torch.device, *, runs: int = 20, warm: int = 3) -> float:
    """Returns the median milliseconds of a call. A GPU measures them itself."""
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
    """Profiles one call: the device's time by kernel on a GPU, and by operator on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    synchronize(device)
    with profile(activities=activities) as profiled:
        call()
        synchronize(device)
    microseconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiled.events() or ():
        # Compiled code annotates regions. Counting them would count their kernels twice.
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
    """Releases unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Memory:
    """Measures the device's allocated memory and its peak, relative to the creation of this object."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        synchronize(device)
        self._before = self.allocated()
        self.restart()

    def allocated(self) -> int:
        """Returns the bytes that are allocated now, or 0 on a CPU."""
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def restart(self) -> int:
        """Returns the peak above the initial allocation, in bytes, and resets it."""
        if not self._on_gpu:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak - self._before

    def held(self) -> int:
        """Returns the bytes that are allocated now, minus the initial allocation."""
        return self.allocated() - self._before

    def values(self) -> dict[str, Any]:
        """Returns the fields of a row: initial gigabytes, their peak, and the difference."""
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
    """Returns the clocks and power of the first GPU from nvidia-smi. Empty if there is no nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(
        zip(fields.split(","), (value.strip() for value in answer.splitlines()[0].split(",")), strict=True)
    )


def digest(array: NDArray[Any]) -> str:
    """Returns the first 16 digits of an array's SHA-256 digest."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def graphs() -> dict[str, int]:
    """Returns the number of graphs that this process has compiled, and how many came from the cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "from_cache": counters["inductor"]["fxgraph_cache_hit"],
    }
