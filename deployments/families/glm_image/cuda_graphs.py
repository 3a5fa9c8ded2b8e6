"""Passes over static buffers, captured as CUDA graphs and replayed without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP_RUNS = 3
"""Number of runs before a capture, in which the compiler and the libraries set themselves up."""

MAX_AHEAD = 2
"""Number of passes that the host enqueues ahead of the device. A larger number would delay cancellation."""


def set_without_waiting(buffer: torch.Tensor, values: torch.Tensor) -> None:
    """Copies values from the CPU to a buffer. Torch keeps the pinned source until the copy is done."""
    if buffer.device.type == "cuda":
        values = values.contiguous().pin_memory()
    buffer.copy_(values, non_blocking=True)


class CUDAGraphs:
    """Captures passes and replays them, one at a time and in any order.

    All graphs share one memory pool.

    Args:
        device: device of the passes. On a device other than CUDA they run without graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_cuda else None
        self._ahead: deque[torch.cuda.Event] = deque()

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Runs a pass, captures it, and returns the function that replays it.

        Args:
            run: the pass. It reads and writes buffers with fixed addresses, and never waits for the device.

        Returns:
            A function that repeats the pass. It returns the same tensor each time, which the next replay of
            any graph may overwrite.
        """
        if not self._on_cuda:
            run()
            return run
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # In the default mode, another thread's query of the free memory would break the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> torch.Tensor:
            if len(self._ahead) == MAX_AHEAD:
                self._ahead.popleft().synchronize()
            graph.replay()
            event = torch.cuda.Event(blocking=True)  # by default, waiting occupies a CPU core
            event.record()
            self._ahead.append(event)
            return result

        return replay
