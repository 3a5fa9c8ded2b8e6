"""The VAE's decoder: memory layouts, tiles, and correctness of large images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deployments.engines import acceleration, compilation
from tests.gpu import measure, models

if TYPE_CHECKING:
    from tests.gpu.rows import Run

FACTOR = 8
"""Pixels of a latent's side."""
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = 0.2
"""Maximum difference, relative to the pixels' spread, of two images that count as equal.

Norms cover a tile or the whole image, so rounding is not the only difference. The difference is about one if
pixels are missing or wrong.
"""


@torch.inference_mode()
def vae(run: Run) -> None:
    """Writes times and memory of both layouts, and the effect of tiles."""
    device = measure.prepare(run)
    model = models.vae(device, tiny_size=run.tiny)
    if run.tiny:  # its default tiles are larger than its images
        model.tile_sample_min_size, model.tile_latent_min_size = 256, 256 // FACTOR
    latents = [random_latents(run, model, pixels) for pixels in (1024, 2048)]
    for one in latents:
        for layout in LAYOUTS:
            time(run, model, one, layout)
    whole_and_tiled(run, model, latents[-1])
    for layout in LAYOUTS:
        compiled = models.vae(device, tiny_size=run.tiny)
        acceleration.compile_vae(compiled, compilation.options(device))
        for one in latents:
            time(run, compiled, one, layout, "compiled")


def random_latents(run: Run, model: Any, pixels: int) -> torch.Tensor:
    """Returns latents of a square image."""
    side = run.size(pixels) // FACTOR
    shape = (1, model.config.latent_channels, side, side)
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def whole_and_tiled(run: Run, model: Any, latents: torch.Tensor) -> None:
    """Writes the difference of an image from the same image in tiles, with the weights as they are."""
    device, side = latents.device, FACTOR * latents.shape[-1]
    with run.figure("vae, tiles against the whole", side=side) as values:
        whole = decode(model, latents)
        model.enable_tiling()
        memory = measure.Memory(device)
        tiled, values["seconds_in_tiles"] = measure.seconds(lambda: decode(model, latents), device)
        values |= compare(whole, tiled, away_from_seams(model, side)) | memory.values()


def time(run: Run, model: Any, latents: torch.Tensor, layout: str, kind: str = "plain") -> None:
    """Writes the time and memory of an image with the weights in one layout."""
    device, side = latents.device, FACTOR * latents.shape[-1]
    with run.figure("vae, an image", kind=kind, side=side, layout=layout) as values:
        model.to(memory_format=LAYOUTS[layout])
        memory = measure.Memory(device)
        values["ms"] = measure.milliseconds(lambda: decode(model, latents), device, runs=2, warm=1)
        values |= memory.values()


def decode(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Returns the pixels of latents: shape (3, height, width)."""
    pixels: torch.Tensor = model.decode(latents, return_dict=False)[0][0]
    return pixels


def away_from_seams(model: Any, side: int) -> torch.Tensor:
    """Returns a mask, for rows and columns alike, of positions inside a single tile. Shape (side,)."""
    tile = model.tile_sample_min_size
    stride = int(tile * (1 - model.tile_overlap_factor))
    at = torch.arange(side, device=model.device)
    inside: torch.Tensor = (at < stride) | (at % stride >= tile - stride)
    return inside


def compare(whole: torch.Tensor, tiled: torch.Tensor, inside: torch.Tensor) -> dict[str, Any]:
    """Returns the difference of two images relative to their spread, and the number of constant rows."""
    whole, tiled = whole.float(), tiled.float()
    spread = whole.std()
    apart = (whole - tiled).abs().mean(dim=0) / spread
    inner = apart[inside][:, inside]
    return {
        "apart": apart.mean().item(),
        "apart_away_from_seams": inner.mean().item(),
        "worst_row_away_from_seams": inner.mean(dim=1).max().item(),
        "same_away_from_seams": bool(inner.mean(dim=1).max() < TOLERANCE),
        "constant_rows": int((whole.std(dim=2) == 0).any(dim=0).sum()),
        "spread": spread.item(),
    }
