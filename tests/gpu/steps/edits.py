"""Edits with one and with four source images, and the warm-up that compiles every kind of image."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from deployments.engines import acceleration
from deployments.families.glm_image.decoder import units_of_each_kind
from tests.gpu import engines, measure

if TYPE_CHECKING:
    from tests.gpu.rows import Run

KINDS = ("no text", "text", "edit with text")


def edits(run: Run) -> None:
    """Writes the seconds of the warm-up and of edits."""
    device = measure.prepare(run)
    side, steps = run.size(1024), run.count(10, 3)
    loaded = engines.load_decoder(run, device, side=side)
    with run.figure("edits, warm-up of a stage", side=side) as values:
        ends = [time.perf_counter()]
        units = units_of_each_kind((side, side - 32), (side, side))
        acceleration.warm_up(
            loaded.config, loaded.engine.decode, units, lambda _: ends.append(time.perf_counter())
        )
        for kind, begin, end in zip(KINDS, ends[:-1], ends[1:], strict=True):
            values[kind] = end - begin
        values["seconds"] = ends[-1] - ends[0]
        values |= measure.graphs()
    for sources in (1, 4):
        with run.figure(
            "edits, an image", side=side, sources=sources, source_side=side, steps=steps
        ) as values:
            engines.paint(
                loaded.engine, engines.unit(run, side, 2, sources=sources, source_side=side), device
            )
            before = measure.graphs()["graphs"]
            memory = measure.Memory(device)
            request = engines.unit(run, side, steps, sources=sources, source_side=side)
            painted = engines.paint(loaded.engine, request, device)
            values |= {
                "seconds": painted.seconds,
                "seconds_50_steps": painted.seconds_for(50, steps),
                "step_s": painted.step_s,
                "before_steps_s": painted.seconds - painted.rest_s - steps * painted.step_s,
                "graphs_more": measure.graphs()["graphs"] - before,
                "digest": measure.digest(painted.pixels),
            }
            values |= memory.values()
