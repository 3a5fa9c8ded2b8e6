"""Prometheus metrics. Each process counts for itself; Ray collects and exports the numbers.

Ray puts `ray_` before each name, and `_total` after a counter's. It adds labels for the deployment and the
process. It estimates a histogram's `_sum` from its buckets, so a counter counts the seconds of work too. It
drops a gauge that was not set for twenty seconds, so gauges are set repeatedly. (Ray 2.60.)
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from ray.util.metrics import Counter as RayCounter
    from ray.util.metrics import Gauge as RayGauge
    from ray.util.metrics import Histogram as RayHistogram

PREFIX = "image_server_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 3600)
"""Upper bounds of the buckets of durations."""


class Metric:
    """Base of the metrics. Ray's own object is made at first use, because it looks up its replica.

    Args:
        name: name without the prefix, and without `_total` for a counter.
        description: text for people; the reference of metrics has it too.
        labels: names of the labels. Each has few values, and users choose none of them.
    """

    def __init__(self, name: str, description: str, *labels: str) -> None:
        self.name = f"{PREFIX}{name}"
        self.description = description
        self.labels = labels

    @property
    def exported_as(self) -> str:
        """The metric's name in Prometheus."""
        return f"ray_{self.name}"

    def _made(self, kind: str, **options: Any) -> Any:
        from ray.serve import metrics  # here, because tests and scripts of the engines work without Ray

        cls = getattr(metrics, kind)
        return cls(self.name, description=self.description, tag_keys=self.labels, **options)


class Counter(Metric):
    """A number that only grows."""

    @property
    def exported_as(self) -> str:
        """The metric's name in Prometheus."""
        return f"ray_{self.name}_total"

    @cached_property
    def _ray(self) -> RayCounter:
        made: RayCounter = self._made("Counter")
        return made

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds an amount. Does nothing for 0 or less, which Ray rejects."""
        if amount > 0:
            self._ray.inc(amount, tags=labels)


class Gauge(Metric):
    """A number that rises and falls."""

    @cached_property
    def _ray(self) -> RayGauge:
        made: RayGauge = self._made("Gauge")
        return made

    def set(self, value: float, **labels: str) -> None:
        """Sets the value. Call it again within ten seconds, changed or not."""
        self._ray.set(value, tags=labels)


class Histogram(Metric):
    """A distribution of durations."""

    @cached_property
    def _ray(self) -> RayHistogram:
        made: RayHistogram = self._made("Histogram", boundaries=list(SECONDS))
        return made

    def observe(self, seconds: float, **labels: str) -> None:
        """Adds one duration. A negative one counts as 0."""
        self._ray.observe(max(0.0, seconds), tags=labels)


LOADS = Counter("loads", "Attempts to load an engine, by `outcome`: `loaded` or `failed`.", "outcome")
LOAD_SECONDS = Histogram("load_seconds", "Seconds taken to load an engine.")
UNLOADS = Counter("unloads", "Engines unloaded, when idle or by hand.")
WORK = Counter(
    "work",
    "Work done by an engine, including work for cancelled images. `unit` is `tokens` (prior tokens generated "
    "or read, or tokens of prompts written), `passes` (runs of the prior model that generate tokens, once "
    "for each request in the run), `steps` (denoising steps) or `images` (images checked).",
    "unit",
)
RUNNING = Gauge(
    "running", "Requests that a replica has accepted. The prior stage runs several of them at the same time."
)
MEMORY = Gauge(
    "memory_bytes",
    "Memory of a replica, by `kind`. On a GPU: `allocated` and `reserved` by PyTorch, and `free` and `total` "
    "of the device. On a CPU: `resident` memory of the process.",
    "kind",
)


def measure_memory(device: str) -> dict[str, Any]:
    """Sets the gauge of this process's memory.

    Args:
        device: device of the stage, `cuda` or `cpu`.

    Returns:
        The `device`, which is the name of the GPU or `CPU`, and its `memory`: bytes by `kind`. Empty while a
        stage on a GPU has not begun to load.
    """
    if device == "cuda":
        # It is not imported here: while the engine's thread imports it, the replica's reports would wait.
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is None or not cuda.is_initialized():
            return {}
        name = cuda.get_device_name()
        memory = {"allocated": cuda.memory_allocated(), "reserved": cuda.memory_reserved()}
        memory["free"], memory["total"] = cuda.mem_get_info()
    else:
        name, memory = "CPU", {"resident": psutil.Process().memory_info().rss}
    for kind, size in memory.items():
        MEMORY.set(size, kind=kind)
    return {"device": name, "memory": memory}
