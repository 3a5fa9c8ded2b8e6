"""The memory of the decoder stage, predicted and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.engines import acceleration
from deployments.stages.calls import Call
from deployments.types import Progress
from tests.gpu import engines, measure
from tests.gpu.rows import NEEDS_GPU

if TYPE_CHECKING:
    import torch

    from deployments.types import ImageRequest
    from tests.gpu.engines import LoadedDecoder
    from tests.gpu.rows import Run

STEPS = 2


def memory(run: Run) -> None:
    """Writes predicted and measured gigabytes of sizes, source images and options."""
    device = measure.prepare(run)
    loaded = engines.load_decoder(run, device, side=run.size(1024), compile=False)
    for pixels, tiled in ((1024, False), (2048, False), (2048, True)):
        side = run.size(pixels)
        with run.figure("memory, an image", side=side, vae_tiling=tiled) as values:
            if tiled:
                acceleration.tile_vae(loaded.pipeline)
            predicted = acceleration.component_bytes(loaded.pipeline, side, device)
            values["predicted_gb"] = {part: size / 1e9 for part, size in predicted.items()}
            values["measured_gb"] = parts_of(loaded, engines.unit(run, side, STEPS), device)
    for pixels in (1024, 2048):
        side = run.size(pixels)
        with run.figure("memory, a source image", side=side) as values:
            request = engines.unit(run, run.size(1024), STEPS, sources=1, source_side=side)
            values["predicted_gb"] = loaded.pipeline.source_bytes(side) / 1e9
            values["measured_gb"] = parts_of(loaded, request, device)


def offload(run: Run) -> None:
    """Writes the GPU memory of a stage whose weights are offloaded to the CPU."""
    device = measure.prepare(run)
    for way in ("model", "group"):
        offloaded(run, way, device)


def parts_of(loaded: LoadedDecoder, request: ImageRequest, device: torch.device) -> Any:
    """Returns gigabytes in addition to the weights: the peak of each part, and memory kept between steps."""
    measure.free(device)
    memory = measure.Memory(device)
    taken: dict[str, float] = {}

    def report(event: object) -> None:
        if isinstance(event, Progress):
            most = memory.restart() / 1e9
            # Before the first step, the VAE and the DiT encode the source images.
            taken["transformer" if event.done > 1 else "until_first_step"] = most
            taken["kept_between_steps"] = memory.held() / 1e9

    loaded.engine.decode(request, Call(report=report))
    taken["vae"] = memory.restart() / 1e9
    return taken if device.type == "cuda" else NEEDS_GPU


def offloaded(run: Run, way: str, device: torch.device) -> None:
    """Writes the peak memory and the seconds of an image with one way of offloading."""
    if run.needs_gpu(f"memory, offload: {way}"):
        return
    measure.free(device)
    side = run.size(1024)
    with run.figure(f"memory, offload: {way}", side=side) as values:
        loaded = engines.load_decoder(run, device, side=side, compile=False, offload=way)
        values["predicted"] = loaded.predicted
        measure.free(device)
        memory = measure.Memory(device)
        painted = engines.paint(loaded.engine, engines.unit(run, side, STEPS), device)
        values |= {"seconds": painted.seconds, "step_s": painted.step_s} | memory.values()
        values["measured_gb"] = parts_of(loaded, engines.unit(run, side, STEPS), device)
