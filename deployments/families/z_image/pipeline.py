"""Upstream's pipeline with the methods that the decoder stage needs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from deployments.errors import UnsupportedOption
from deployments.families.z_image.attention import RealRotaryAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

TEXT_TOKENS = 512
"""Number of tokens of the longest prompt: `max_sequence_length` of `ZImagePipeline` (diffusers 0.42)."""


class DecoderPipeline(ZImagePipeline):  # type: ignore[misc]
    """`ZImagePipeline` (diffusers 0.42) for text embeddings from the prior stage."""

    def __init__(  # diffusers reads the names of the components from here
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: None,
        tokenizer: None,
        transformer: ZImageTransformer2DModel,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        # The DiT computes its rotary tables at their first use, and keeps them. They are computed here,
        # because `try_step` runs on tensors without contents.
        self.transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
        self.set_progress_bar_config(disable=True)

    def try_step(self, side: int) -> object:
        """Implements `deployments.engines.acceleration.Pipeline.try_step`.

        The step's two passes are one pass with two lines.
        """
        dit = self.transformer
        latent_side = side // self.vae_scale_factor
        floats: dict[str, Any] = {"dtype": dit.dtype, "device": dit.device}
        latents = torch.empty(dit.in_channels, 1, latent_side, latent_side, **floats)
        text = torch.empty(TEXT_TOKENS, dit.config.cap_feat_dim, **floats)
        output: object = dit([latents, latents], torch.zeros(2, device=dit.device), [text, text])
        return output

    def compile(self, options: dict[str, Any]) -> None:
        """Implements `deployments.engines.acceleration.Pipeline.compile`.

        There are six graphs. Blocks with and without time modulation each have one for one line, one for two
        lines, and one for two lines of different lengths.
        """
        forward = torch.compile(ZImageTransformerBlock.forward, fullgraph=True, dynamic=True, options=options)
        for part in self.transformer.modules():
            if isinstance(part, ZImageTransformerBlock):
                part.attention.set_processor(RealRotaryAttention())
                part.forward = partial(_run_block, forward, part)

    def cache_steps(self, threshold: float) -> None:
        """Implements `deployments.engines.acceleration.Pipeline.cache_steps`."""
        raise UnsupportedOption("diffusers has no first-block cache for Z-Image; set it to 0")


def _run_block(
    forward: Callable[..., torch.Tensor],
    block: ZImageTransformerBlock,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: torch.Tensor,
    temb: torch.Tensor | None = None,
    *_: None,
) -> torch.Tensor:
    """Runs a compiled block on contiguous arguments. Each other layout would need a graph of its own."""
    return forward(block, hidden.contiguous(), mask, rotary.contiguous(), temb)
