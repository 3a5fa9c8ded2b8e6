"""The decoder of GLM-Image: prior tokens to pixels, by upstream's own pipeline. No Ray in here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from deployments.engines import acceleration, compilation
from deployments.engines.checkpoint import WEIGHTS_SHARE, part_of
from deployments.engines.diffusion import PipelineDecoder
from deployments.families.glm_image import checkpoint
from deployments.types import ImageRequest, PriorTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.engines.acceleration import Size
    from deployments.types import Pixels, TokenGrid

logger = logging.getLogger("ray.serve")


class Decoder(PipelineDecoder):
    """Paints prior tokens by `GlmImagePipeline` (diffusers 0.42)."""

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """See `deployments.families.Decoder`."""
        read = 1.0
        if model.decoder.compiles:
            compilation.prepare(model.compile_cache)
            read = WEIGHTS_SHARE
        pipeline = checkpoint.load_decoder(model, part_of(report, 0, read))
        largest = model.traits.max_side
        acceleration.apply(pipeline, model.decoder, max_side=largest)
        logger.info(
            "a source image of %dx%d takes %.1f GB", largest, largest, pipeline.source_bytes(largest) / 1e9
        )
        decoder = cls(pipeline)
        units = _units_of_each_kind(*acceleration.warm_up_sizes(model))
        acceleration.warm_up(model.decoder, decoder.decode, units, part_of(report, read, 1))
        return decoder

    def _run(self, request: ImageRequest, **arguments: Any) -> torch.Tensor:
        images: torch.Tensor = self._pipeline(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            **self._conditions(request),
            **arguments,
        ).images
        return images

    def _conditions(self, request: ImageRequest) -> dict[str, Any]:
        """The prior tokens and source images, as the pipeline takes them."""
        prior = request.prior
        assert isinstance(prior, PriorTokens)  # noqa: S101 - both stages are of one family
        conditions: dict[str, Any] = {"prior_token_ids": self._upsample(prior.target)[None]}
        if request.sources:
            grids = prior.sources
            conditions |= {
                "image": [Image.fromarray(source) for source in request.sources],
                "prior_token_image_ids": [torch.cat([self._upsample(grid) for grid in grids])],
                "source_image_grid_thw": [torch.tensor([[1, 2 * g.shape[0], 2 * g.shape[1]] for g in grids])],
            }
        return conditions

    def _upsample(self, grid: TokenGrid) -> torch.Tensor:
        """From a token for 32×32 pixels to one for 16×16, the DiT's grid: shape (4 × tokens,)."""
        return torch.from_numpy(grid.repeat(2, 0).repeat(2, 1).reshape(-1)).to(self._device)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        mean, std = (
            torch.tensor(numbers, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean


def _units_of_each_kind(first: Size, others: Size) -> list[ImageRequest]:
    """Units for all graphs of the DiT and all parts of the pipeline: without text, with text, and an edit.

    Args:
        first: width and height of the first unit, and of the edits' source images.
        others: width and height of the other units.
    """
    source = np.zeros((first[1], first[0], 3), dtype=np.uint8)
    kinds: list[tuple[str, Size, tuple[Pixels, ...]]] = [
        ("", first, ()),
        ('"text"', others, ()),
        ('"text"', others, (source,)),
    ]
    return [
        ImageRequest(
            prompt=prompt,
            width=size[0],
            height=size[1],
            seed=0,
            steps=2,
            guidance_scale=1.5,
            prior=PriorTokens(target=_grid(size), sources=tuple(_grid(first) for _ in sources)),
            sources=sources,
        )
        for prompt, size, sources in kinds
    ]


def _grid(size: Size) -> TokenGrid:
    """Prior tokens of an image of this width and height."""
    return np.zeros((size[1] // 32, size[0] // 32), dtype=np.int64)
