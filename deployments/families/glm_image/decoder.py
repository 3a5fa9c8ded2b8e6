"""The decoder of GLM-Image: prior tokens to pixels, by upstream's own pipeline. It does not use Ray."""

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
from deployments.families.warm_up import warm_up_unit
from deployments.types import PriorTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.engines.acceleration import Size
    from deployments.types import ImageRequest, TokenGrid

logger = logging.getLogger("ray.serve")


class Decoder(PipelineDecoder):
    """Decodes prior tokens by `GlmImagePipeline` (diffusers 0.42)."""

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """Implements `deployments.families.FamilyEngine.load`."""
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
        units = units_of_each_kind(*acceleration.warm_up_sizes(model))
        acceleration.warm_up(model.decoder, decoder.decode, units, part_of(report, read, 1))
        return decoder

    def _run(self, request: ImageRequest, **arguments: Any) -> torch.Tensor:
        images: torch.Tensor = self.pipeline(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            **self.conditions(request),
            **arguments,
        ).images
        return images

    def conditions(self, request: ImageRequest) -> dict[str, Any]:
        """Returns the prior tokens and source images as arguments of the pipeline."""
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
        """Converts one token for 32×32 pixels to four for 16×16, the DiT's grid: shape (4 × tokens,)."""
        return torch.from_numpy(grid.repeat(2, 0).repeat(2, 1).reshape(-1)).to(self._device)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(numbers, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean


def units_of_each_kind(first: Size, others: Size) -> list[ImageRequest]:
    """Returns units for all graphs of the DiT and all parts of the pipeline.

    They are an image without text, one with text, and an edit.

    Args:
        first: width and height of the first unit, and of the edit's source image.
        others: width and height of the other units.
    """
    source = np.zeros((first[1], first[0], 3), dtype=np.uint8)
    text, target = '"text"', _grid(others)
    return [
        warm_up_unit(first, PriorTokens(target=_grid(first))),
        warm_up_unit(others, PriorTokens(target=target), prompt=text),
        warm_up_unit(
            others, PriorTokens(target=target, sources=(_grid(first),)), prompt=text, sources=(source,)
        ),
    ]


def _grid(size: Size) -> TokenGrid:
    """Returns prior tokens for an image of this width and height."""
    return np.zeros((size[1] // 32, size[0] // 32), dtype=np.int64)
