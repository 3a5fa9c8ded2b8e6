"""The decoder of GLM-Image: prior tokens to pixels, by upstream's own pipeline. No Ray in here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from deployments.errors import Cancelled
from deployments.glm_image import checkpoint
from deployments.types import Progress

if TYPE_CHECKING:
    from diffusers import GlmImagePipeline

    from deployments.calls import Call
    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, Pixels, TokenGrid


class Decoder:
    """Paints prior tokens, one unit at a time.

    The pixels are those of `GlmImagePipeline` (diffusers 0.42) called whole, with a generator of the
    same seed on the same device.
    """

    def __init__(self, pipeline: GlmImagePipeline) -> None:
        self._pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        # Text in quotes may hold `</s>` and the like: letters to be painted, not control tokens.
        pipeline.tokenizer.split_special_tokens = True

    @classmethod
    def load(cls, model: ModelConfig) -> Decoder:
        """See `deployments.families.Decoder`."""
        return cls(checkpoint.load_decoder(model))

    def decode(self, request: DecodeRequest, call: Call) -> Pixels:
        """See `deployments.families.Decoder`."""
        if call.cancelled.is_set():
            raise Cancelled
        began = time.monotonic()

        def after_step(_: GlmImagePipeline, step: int, *__: Any) -> dict[str, Any]:
            if call.cancelled.is_set():
                raise Cancelled
            call.report(Progress(done=step + 1, total=request.steps, seconds=time.monotonic() - began))
            return {}

        images = self._pipeline(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator(self._pipeline.device).manual_seed(request.seed),
            callback_on_step_end=after_step,
            **self._conditions(request),
        ).images
        return np.asarray(images[0])

    def _conditions(self, request: DecodeRequest) -> dict[str, Any]:
        """The prior tokens and source images, as the pipeline takes them."""
        conditions: dict[str, Any] = {"prior_token_ids": self._upsample(request.tokens.target)[None]}
        if request.sources:
            grids = request.tokens.sources
            conditions |= {
                "image": [Image.fromarray(source) for source in request.sources],
                "prior_token_image_ids": [torch.cat([self._upsample(grid) for grid in grids])],
                "source_image_grid_thw": [torch.tensor([[1, 2 * g.shape[0], 2 * g.shape[1]] for g in grids])],
            }
        return conditions

    def _upsample(self, grid: TokenGrid) -> torch.Tensor:
        """From a token for 32×32 pixels to one for 16×16, the DiT's grid: shape (4 × tokens,)."""
        return torch.from_numpy(grid.repeat(2, 0).repeat(2, 1).reshape(-1)).to(self._pipeline.device)
