"""How engines survive an error: log it, free the device's memory, and notice a lost device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch

from deployments.errors import EngineFault, OutOfMemoryError, release

if TYPE_CHECKING:
    from collections.abc import Callable


class Faulty(Protocol):
    """An engine with a fault, or None; see `deployments.families`."""

    fault: EngineFault | None


class guarded:  # noqa: N801 - used like a function
    """Context manager that logs an error of its block and frees what the block has left on the device.

    The error is raised again, without the block's frames, which hold tensors. If the device is lost, the
    engine gets a fault. This is a class because `contextlib.contextmanager` would restore the frames.

    Args:
        engine: engine that runs the block.
        device: device of the engine.
        name: name of the engine, for people.
        request_id: id of the client's request, or several of them, for the log.
        too_large: message if the device has too little memory. Defaults to one with the name and the error.
        recover: prepares the engine for its next unit. Called after an error, unless the device is lost.

    Raises:
        EngineFault: the engine has a fault from before.
        OutOfMemoryError: the device has too little memory for the block.
    """

    def __init__(
        self,
        engine: Faulty,
        device: torch.device,
        name: str,
        *,
        request_id: str,
        too_large: str = "",
        recover: Callable[[], object] = lambda: None,
    ) -> None:
        self._engine = engine
        self._device = device
        self._name = name
        self._request_id = request_id
        self._too_large = too_large
        self._recover = recover

    def __enter__(self) -> None:
        if self._engine.fault:
            raise self._engine.fault

    def __exit__(self, _: object, error: BaseException | None, frames: object) -> Literal[False]:
        del frames  # else their tensors would still live when memory is freed
        if isinstance(error, Exception):
            release(error, f"{self._name} failed", request_id=self._request_id)
            if lost := _free(self._device):
                self._engine.fault = EngineFault(f"{self._name} stopped: {lost}")
            else:
                self._recover()
            if isinstance(error, torch.OutOfMemoryError):
                too_large = f"{self._name} has too little memory for this request: {error}"
                raise OutOfMemoryError(self._too_large or too_large) from error
        return False


def _free(device: torch.device) -> Exception | None:
    """Frees unused memory of a device. Returns the device's error if it is lost."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)  # a lost device raises the same error every time
        except RuntimeError as error:
            return error
        torch.cuda.empty_cache()
    return None
