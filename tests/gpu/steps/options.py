"""The cost of each decoder option, and its effect on the pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deployments.engines import acceleration
from tests.gpu import engines, measure

if TYPE_CHECKING:
    import torch

    from deployments.types import Pixels
    from tests.gpu.engines import LoadedDecoder
    from tests.gpu.rows import Run

STEPS = 8
BACKENDS = ("_native_flash", "_native_cudnn")
CPU_BACKENDS = ("_native_math",)
"""Backends for trying the code on a CPU."""


def options(run: Run) -> None:
    """Writes a row for each option, compared with an uncompiled decoder without options."""
    device = measure.prepare(run)
    loaded = load(run, device)
    plain: Pixels | None = None
    with run.figure("options, plain") as values:
        plain = measured(run, loaded, device, plain, values)
    for backend in BACKENDS if run.on_gpu else CPU_BACKENDS:
        with run.figure("options, attention", backend=backend) as values:
            acceleration.choose_attention(loaded.pipeline, backend)
            measured(run, loaded, device, plain, values)
    acceleration.choose_attention(loaded.pipeline, "native")
    with run.figure("options, three previews") as values:
        measured(run, loaded, device, plain, values, previews=3)
    chosen: dict[str, Any]
    for chosen in ({"step_cache": 0.1}, {"quantization": "fp8"}):
        with run.figure("options, another decoder", **chosen) as values:
            del loaded
            measure.free(device)
            loaded = load(run, device, **chosen)
            measured(run, loaded, device, plain, values)


def load(run: Run, device: torch.device, **chosen: Any) -> LoadedDecoder:
    """Builds a decoder that is not compiled."""
    return engines.load_decoder(run, device, side=run.size(1024), compile=False, **chosen)


def measured(
    run: Run,
    loaded: LoadedDecoder,
    device: torch.device,
    plain: Pixels | None,
    values: dict[str, Any],
    *,
    previews: int = 0,
) -> Pixels:
    """Adds an image's times, memory and difference from the plain image to a row. Returns its pixels."""
    side, steps = run.size(1024), run.count(STEPS, 4)
    engines.paint(loaded.engine, engines.unit(run, side, 1), device)
    memory = measure.Memory(device)
    request = replace(engines.unit(run, side, steps), previews=previews)
    painted = engines.paint(loaded.engine, request, device)
    values |= {
        "side": side,
        "steps": steps,
        "seconds": painted.seconds,
        "ms_a_pass": 1e3 * painted.step_s / 2,
    }
    values |= memory.values()
    if plain is not None:
        values["mean_difference"] = engines.difference(painted.pixels, plain)
    return painted.pixels
