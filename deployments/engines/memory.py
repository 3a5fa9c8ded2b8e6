"""Memory of a device: how much is free, and how much a computation would need."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


def free_bytes(device: torch.device) -> int:
    """Returns the number of free bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available: int = psutil.virtual_memory().available
    return available


def wait_for(device: torch.device) -> None:
    """Waits until the device has done all work that this thread has launched.

    Launches on a GPU return at once. Without waiting, a thread would be steps ahead of its device. Its
    progress would be wrong, and a cancelled unit would run for as many steps more. The core sleeps meanwhile;
    by default CUDA polls.
    """
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def working_bytes(computation: Callable[[], object]) -> int:
    """Returns the peak memory of a computation, in bytes, without the weights that it reads.

    The computation runs with fake tensors, which have shapes and no contents. So it takes neither the memory
    nor the time. Memory that libraries allocate inside an operator is not counted.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.inference_mode(), _Tracker() as tracker:
        computation()
        left: int = tracker.live  # the fake tensors that stand for the weights are still alive
        peak: int = tracker.peak
        return peak - left


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate, while they live.

    Attributes:
        live: bytes that are allocated now.
        peak: largest value of `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts its outputs. PyTorch calls this for every operator."""
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.untyped_storage() not in self._storages:
                storage = output.untyped_storage()
                self._storages.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return outputs

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
