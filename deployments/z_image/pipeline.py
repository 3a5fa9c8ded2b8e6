"""Upstream's pipeline, as the decoder stage uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import ZImagePipeline

from deployments.errors import UnsupportedOption

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

TEXT_TOKENS = 512
"""Of the longest prompt: `max_sequence_length` of `ZImagePipeline` (diffusers 0.42)."""


class DecoderPipeline(ZImagePipeline):  # type: ignore[misc]
    """`ZImagePipeline` (diffusers 0.42) for texts that were encoded elsewhere."""

    def __init__(  # diffusers reads the names of the components from here
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: None,
        tokenizer: None,
        transformer: ZImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        # The DiT makes its rotary tables when they are first used, and keeps them: they are to be real ones,
        # and `try_step` is run without contents.
        self.transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
        self.set_progress_bar_config(disable=True)

    def try_step(self, side: int) -> object:
        """See `deployments.acceleration.Pipeline`. Its two passes are one, with two lines."""
        dit = self.transformer
        latent_side = side // self.vae_scale_factor
        latents = torch.empty(dit.in_channels, 1, latent_side, latent_side, dtype=dit.dtype)
        text = torch.empty(TEXT_TOKENS, dit.config.cap_feat_dim, dtype=dit.dtype)
        output: object = dit([latents, latents], torch.zeros(2), [text, text])
        return output

    def cache_steps(self, threshold: float) -> None:
        """See `deployments.acceleration.Pipeline`."""
        raise UnsupportedOption("diffusers has no first-block cache for this family; set it to 0")
