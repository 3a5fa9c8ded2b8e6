"""The CPUs that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def cpu_limit(cpu_max: Path = CGROUP_CPU_MAX) -> int:
    """Returns the number of CPUs that this process may use, by its affinity and its container's quota.

    Args:
        cpu_max: file of the quota (cgroup v2): microseconds in a period, or `max`, and the period's length.
    """
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota
        return available
