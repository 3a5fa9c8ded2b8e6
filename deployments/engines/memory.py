"""How much memory a device has, and how much a computation would take."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deployments.errors import EngineFault, OutOfMemoryError, release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deployments.stages.calls import Call


class Faulty(Protocol):
    """An engine, as far as its fault goes; see `deployments.families`."""

    fault: Exception | None


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody has taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available: int = psutil.virtual_memory().available
    return available


def wait_for(device: torch.device) -> None:
    """Waits until the device has done what this thread has given it.

    A GPU's launches return at once. Without waiting a thread would be steps ahead of it: its progress would
    not be true, and a cancelled unit would go on for as long. The core sleeps meanwhile; by default CUDA
    polls.
    """
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def cleared(device: torch.device) -> Exception | None:
    """Let go, after an error, of what the work has left on the device; returns why that is lost, if it is."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)  # a device that is lost raises the same error for ever
        except RuntimeError as error:
            return error
        torch.cuda.empty_cache()
    return None


@contextmanager
def surviving(engine: Faulty, device: torch.device, who: str, call: Call) -> Iterator[None]:
    """What goes wrong in the block is logged, and leaves nothing behind on the device.

    Args:
        engine: gets a fault if the device is lost.
        device: that it works on.
        who: it is, for people.
        call: which is worked on.

    Raises:
        EngineFault: the engine has one already.
        OutOfMemoryError: the device has too little memory.
    """
    if engine.fault:
        raise engine.fault
    try:
        yield
    except Exception as error:
        release(error, f"{who} failed", request_id=call.request_id)
        if lost := cleared(device):
            engine.fault = EngineFault(f"{who} stopped: {lost}")
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemoryError(f"{who} has too little memory") from error
        raise


def working_bytes(computation: Callable[[], object]) -> int:
    """The most memory that a computation takes at once beside the weights it reads.

    The computation is gone through with tensors that have shapes and no contents: it takes neither the
    memory nor the time. What libraries take for themselves inside an operator is not counted.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.inference_mode(), _Tracker() as tracker:
        computation()
        left: int = tracker.live  # what is still alive are the weights' stand-ins
        peak: int = tracker.peak
        return peak - left


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
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
