"""Settings of `torch.compile` for the stages: the same code on every replica, cached between starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from deployments.cpus import cpu_limit

RECOMPILE_LIMIT = 64
"""Maximum number of graphs of one function. Beyond it torch runs the function uncompiled, or fails."""
HOPPER = (9, 0)
"""First compute capability with programmatic dependent launch."""


def prepare(cache: str) -> None:
    """Configures the compiler of this process. Call it before the first compilation.

    Args:
        cache: folder for compiled code. The compiler's own keys cover versions and devices, so replicas of
            different kinds may share it. The environment variable
            `TORCHINDUCTOR_CACHE_DIR` takes precedence.
    """
    # The compiler's own modules set the variable to their default when they are imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache).expanduser())
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # The compiler starts a process for each CPU of the machine, even in a container with few.
        torch._inductor.config.compile_threads = min(torch._inductor.config.compile_threads or 1, cpu_limit())
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # The numbers of a module stay constants, even where lengths are dynamic.
    torch._dynamo.config.specialize_float = True


def options(device: torch.device) -> dict[str, Any]:
    """Returns the `options` for every `torch.compile` call on this device.

    By default the compiler times several configurations of a kernel and keeps the fastest. Configurations of
    a sum add in different orders, so two replicas could round differently. With these options each kernel has
    one configuration. They are passed to each call because Dynamo resets the process-wide setting after the
    first compiled frame (torch 2.11 and 2.13).
    """
    chosen: dict[str, Any] = {"deterministic": True, "triton.autotune_pointwise": False}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        # A kernel is launched before the previous one has ended, and waits for its results itself.
        chosen["triton.enable_pdl"] = True
    return chosen
