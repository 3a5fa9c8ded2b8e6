"""What is counted for Prometheus, by every process for itself; Ray collects it and hands it out.

To a name Ray adds `ray_` in front and, of a counter, `_total` behind; to the labels those of the deployment
and the process. It makes up the `_sum` of a histogram from its buckets, so that seconds are counted besides;
and it drops a gauge that was not set for twenty seconds, so that gauges are set again and again. (Ray 2.60.)
"""

from __future__ import annotations

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
    """Something that is counted. Ray's own object is made at first use: it asks in which replica it is.

    Args:
        name: without the prefix; of a counter without `_total`.
        description: for people; the README has it too.
        labels: what it is counted by. Of each there are few values, none of which a user chooses.
    """

    def __init__(self, name: str, description: str, *labels: str) -> None:
        self.name = f"{PREFIX}{name}"
        self.description = description
        self.labels = labels

    @property
    def exported_as(self) -> str:
        """Its name for Prometheus."""
        return f"ray_{self.name}"

    def _made(self, kind: str, **options: Any) -> Any:
        from ray.serve import metrics  # the engines' tests and scripts need none of it

        cls = getattr(metrics, kind)
        return cls(self.name, description=self.description, tag_keys=self.labels, **options)


class Counter(Metric):
    """A number that only grows."""

    @property
    def exported_as(self) -> str:
        """Its name for Prometheus."""
        return f"ray_{self.name}_total"

    @cached_property
    def _ray(self) -> RayCounter:
        made: RayCounter = self._made("Counter")
        return made

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count so much more; nothing is nothing, which Ray refuses."""
        if amount > 0:
            self._ray.inc(amount, tags=labels)


class Gauge(Metric):
    """A number that goes up and down."""

    @cached_property
    def _ray(self) -> RayGauge:
        made: RayGauge = self._made("Gauge")
        return made

    def set(self, value: float, **labels: str) -> None:
        """So it is now; to be said again within ten seconds."""
        self._ray.set(value, tags=labels)


class Histogram(Metric):
    """Durations, by how long they are."""

    @cached_property
    def _ray(self) -> RayHistogram:
        made: RayHistogram = self._made("Histogram", boundaries=list(SECONDS))
        return made

    def observe(self, seconds: float, **labels: str) -> None:
        """One more of them."""
        self._ray.observe(max(0.0, seconds), tags=labels)


LOADS = Counter("loads", "Loadings of an engine, by their `outcome`: `loaded` or `failed`.", "outcome")
LOAD_SECONDS = Histogram("load_seconds", "Seconds that loading an engine took.")
UNLOADS = Counter("unloads", "Engines that were let go, idle or by hand.")
WORK = Counter(
    "work",
    "What an engine has done, images that were called off included: by `unit` prior `tokens` drawn or read, "
    "denoising `steps`, `images` checked, or `tokens` of prompts written.",
    "unit",
)
RUNNING = Gauge(
    "running", "Requests that a replica has, each in a row of its own if it is the prior stage's."
)
MEMORY = Gauge(
    "memory_bytes",
    "Memory of a replica: on a GPU what PyTorch has `allocated` and `reserved`, and what is `free`; else "
    "what the process has `resident`.",
    "kind",
)


def tell_memory(device: str) -> None:
    """Set the gauge of this process's memory."""
    if device == "cuda":
        import torch  # which the process has loaded by then

        if not torch.cuda.is_initialized():
            return
        MEMORY.set(torch.cuda.memory_allocated(), kind="allocated")
        MEMORY.set(torch.cuda.memory_reserved(), kind="reserved")
        MEMORY.set(torch.cuda.mem_get_info()[0], kind="free")
    else:
        MEMORY.set(psutil.Process().memory_info().rss, kind="resident")
