"""The decoder of GLM-Image: prior tokens to pixels, by upstream's own pipeline. No Ray in here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from deployments import acceleration
from deployments.diffusion import PipelineDecoder
from deployments.glm_image import checkpoint
from deployments.types import PriorTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, TokenGrid

logger = logging.getLogger("ray.serve")


class Decoder(PipelineDecoder):
    """Paints prior tokens by `GlmImagePipeline` (diffusers 0.42)."""

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """See `deployments.families.Decoder`."""
        pipeline, largest = checkpoint.load_decoder(model, report), model.traits.max_side
        acceleration.apply(pipeline, model.decoder, max_side=largest)
        logger.info(
            "a source image of %dx%d takes %.1f GB", largest, largest, pipeline.source_bytes(largest) / 1e9
        )
        decoder = cls(pipeline)
        tokens = PriorTokens(target=np.zeros((16, 16), dtype=np.int64))
        acceleration.try_out(model.decoder, decoder.decode, tokens)
        return decoder

    def _run(self, request: DecodeRequest, **arguments: Any) -> torch.Tensor:
        images: torch.Tensor = self._pipeline(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            **self._conditions(request),
            **arguments,
        ).images
        return images

    def _conditions(self, request: DecodeRequest) -> dict[str, Any]:
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
