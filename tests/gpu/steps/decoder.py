"""The decoder stage at the released size: speed and memory of each image size, compiled and plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.gpu import engines, measure

if TYPE_CHECKING:
    from deployments.types import Pixels
    from tests.gpu.engines import LoadedDecoder
    from tests.gpu.rows import Run

STEPS = 50
"""Denoising steps of the default configuration."""
MADE_STEPS = {512: 20, 1024: 50, 2048: 5}
"""Measured steps of an image's 50, by its side. The seconds of all 50 are extrapolated."""
EXACT_STEPS = 10
"""Steps of the image whose digest is compared with one from a process with an empty cache."""


def decoder(run: Run) -> None:
    """Writes the decoder stage's figures, most important first."""
    device = measure.prepare(run)
    loaded: dict[str, LoadedDecoder] = {}
    images: dict[str, Pixels] = {}
    for kind, chosen in (("compiled", {}), ("plain", {"compile": False})):
        one = load(run, kind, device, **chosen)
        if one is None:
            continue
        loaded[kind] = one
        if kind == "compiled":
            first_image(run, one, device)
        pixels = image(run, kind, one, 1024, device)
        if pixels is not None:
            images[kind] = pixels
    with run.figure("decoder, compiled against plain", side=run.size(1024)) as values:
        values["mean_difference"] = engines.difference(images["compiled"], images["plain"])
    if "compiled" in loaded:
        exact_image(run, loaded["compiled"], device)
    for side in (512, 2048):
        for kind, one in loaded.items():
            image(run, kind, one, side, device)
    for kind, one in loaded.items():  # last, because the profiler slows down later figures
        one_pass(run, kind, one, 1024, device)


def load(run: Run, kind: str, device: torch.device, **chosen: Any) -> LoadedDecoder | None:
    """Builds a decoder, and writes its time and memory. Returns None on failure."""
    with run.figure("decoder, loaded", kind=kind) as values:
        loaded, values["seconds"] = measure.seconds(
            lambda: engines.load_decoder(run, device, side=run.size(2048), **chosen), device
        )
        values |= {"weights_gb": loaded.weights_gb, "predicted": loaded.predicted}
        return loaded
    return None


def first_image(run: Run, loaded: LoadedDecoder, device: torch.device) -> None:
    """Writes the time of a process's first image, which compiles code or reads it from the cache."""
    side = run.size(1024)
    with run.figure("decoder, first image", side=side) as values:
        request = engines.unit(run, side, 2)
        first, again = (engines.paint(loaded.engine, request, device).seconds for _ in range(2))
        values |= {"first_s": first, "again_s": again, "compile_s": first - again} | measure.graphs()


def image(run: Run, kind: str, loaded: LoadedDecoder, pixels: int, device: torch.device) -> Pixels | None:
    """Writes an image's seconds and memory. Returns its pixels, or None on failure."""
    side, steps = run.size(pixels), run.count(MADE_STEPS[pixels], 4)
    with run.figure("decoder, image", kind=kind, side=side, steps=steps) as values:
        engines.paint(loaded.engine, engines.unit(run, side, 1), device)
        memory = measure.Memory(device)
        painted = engines.paint(loaded.engine, engines.unit(run, side, steps), device)
        values |= {
            "seconds": painted.seconds,
            f"seconds_{STEPS}_steps": painted.seconds_for(STEPS, steps),
            "ms_a_pass": 1e3 * painted.step_s / 2,
            "tflops": tflops(run, side, painted.step_s / 2),
            "vae_and_rest_s": painted.rest_s,
            "spread": float(painted.pixels.std()),
            "digest": measure.digest(painted.pixels),
            "weights_gb": loaded.weights_gb,
        }
        values |= memory.values()
        return painted.pixels
    return None


def one_pass(run: Run, kind: str, loaded: LoadedDecoder, pixels: int, device: torch.device) -> None:
    """Writes the time of one pass of the DiT, in total and by kernel."""
    side, dit = run.size(pixels), loaded.pipeline.transformer
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def again() -> object:
        args, kwargs = calls[0]
        output: object = dit(*args, **kwargs)
        return output

    # The stage's own mode. In another one, the blocks would be compiled again.
    with run.figure("decoder, one pass", kind=kind, side=side) as values, torch.inference_mode():
        hook = dit.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            engines.paint(loaded.engine, engines.unit(run, side, 1), device)
        finally:
            hook.remove()
        values["ms"] = ms = measure.milliseconds(again, device, runs=10)
        values["tflops"] = tflops(run, side, ms / 1e3)
    with run.figure("decoder, one pass by kernel", kind=kind, side=side) as values, torch.inference_mode():
        values |= measure.kernels(again, device)


def tflops(run: Run, side: int, seconds: float) -> float | None:
    """Returns the rate of one pass of the released DiT, including attention. None for a tiny model."""
    layers, width, inner = 30, 4096, 16_384
    tokens = (side // 16) ** 2 + 1  # with one text token
    products = 2 * tokens * (4 * width**2 + 2 * width * inner)
    attention = 4 * tokens**2 * width
    return None if run.tiny else layers * (products + attention) / seconds / 1e12


def exact_image(run: Run, loaded: LoadedDecoder, device: torch.device) -> None:
    """Writes the digest of one seed's image, and whether a second image is identical."""
    with run.figure("decoder, pixels of seed 0", side=run.size(1024)) as values:
        request = engines.unit(run, run.size(1024), run.count(EXACT_STEPS, 2))
        one, other = (measure.digest(engines.paint(loaded.engine, request, device).pixels) for _ in range(2))
        values |= {"digest": one, "same_again": one == other}
