"""The units that a decoder runs before its first request, so that no client waits for the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.types import ImageRequest

if TYPE_CHECKING:
    from deployments.engines.acceleration import Size
    from deployments.types import Pixels, Prior


def warm_up_unit(
    size: Size,
    prior: Prior,
    *,
    prompt: str = "",
    guidance_scale: float = 1.5,
    sources: tuple[Pixels, ...] = (),
) -> ImageRequest:
    """Returns a unit of two denoising steps with seed 0.

    Args:
        size: width and height in pixels.
        prior: prior of the unit, from the decoder's own family.
        prompt: text of the unit.
        guidance_scale: guidance scale of the unit.
        sources: source images, for an edit.
    """
    return ImageRequest(
        prompt=prompt,
        width=size[0],
        height=size[1],
        seed=0,
        steps=2,
        guidance_scale=guidance_scale,
        prior=prior,
        sources=sources,
    )
