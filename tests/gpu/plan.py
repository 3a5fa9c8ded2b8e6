"""The steps of the window, in the order of their value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of the window.

    Attributes:
        name: name of the step.
        target: `module:function`. The module is imported before the step's time begins.
        limit_s: seconds until the step is stopped.
        fresh_cache: whether the step has a cache of compiled code of its own.
        beside: name of the previous step, if both run at the same time. Such steps do not measure times.
    """

    name: str
    target: str
    limit_s: float
    fresh_cache: bool = False
    beside: str = ""


def _step(
    name: str, limit_s: float, *, of: str | None = None, fresh_cache: bool = False, beside: str = ""
) -> Step:
    """Creates a step. Its function has its name, and so has its module by default."""
    return Step(
        name=name,
        target=f"tests.gpu.steps.{of or name}:{name}",
        limit_s=limit_s,
        fresh_cache=fresh_cache,
        beside=beside,
    )


STEPS = (
    _step("probe", 60),
    _step("prior", 140),
    _step("decoder", 170),
    _step("image", 90),
    _step("memory", 60),
    _step("ceilings", 50),
    _step("edits", 110),
    _step("exact_prior", 100, of="exact", fresh_cache=True),
    _step("exact_decoder", 100, of="exact", fresh_cache=True, beside="exact_prior"),
    _step("vae", 80),
    _step("options", 80),
    _step("passes", 140, of="prior"),
    _step("upstream", 60),
    _step("offload", 80, of="memory"),
    _step("server", 170),
)


def groups(steps: Iterable[Step]) -> list[list[Step]]:
    """Groups the steps, in order, into lists of steps that run at the same time."""
    grouped: list[list[Step]] = []
    for step in steps:
        if grouped and step.beside == grouped[-1][-1].name:
            grouped[-1].append(step)
        else:
            grouped.append([step])
    return grouped
