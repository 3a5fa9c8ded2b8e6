"""Upstream's pipeline, doing nothing twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from diffusers import GlmImagePipeline
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformerBlock

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import ByT5Tokenizer, T5EncoderModel

    from deployments.families.glm_image.transformer import Transformer

GLYPH_CACHE_BYTES = 256 * 2**20
"""Of the device's memory; a short text takes some kilobytes, the longest prompt about 100 MB."""


class DecoderPipeline(GlmImagePipeline):  # type: ignore[misc]
    """`GlmImagePipeline` (diffusers 0.42) for prior tokens that were made elsewhere: the same pixels.

    Glyph embeddings are kept for the next unit with the same text. The step's callback may ask for the
    predicted velocity, as `noise_pred`.
    """

    _callback_tensor_inputs = (*GlmImagePipeline._callback_tensor_inputs, "noise_pred")

    def __init__(  # diffusers reads the names of the components from here
        self,
        tokenizer: ByT5Tokenizer,
        processor: None,
        text_encoder: T5EncoderModel,
        vision_language_encoder: None,
        vae: AutoencoderKL,
        transformer: Transformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__(
            tokenizer, processor, text_encoder, vision_language_encoder, vae, transformer, scheduler
        )
        self._last_step: torch.Tensor | None = None
        self._glyphs: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        # Text in quotes may hold `</s>` and the like: letters to be painted, not control tokens.
        self.tokenizer.split_special_tokens = True
        self.set_progress_bar_config(disable=True)

    def _get_glyph_embeds(
        self,
        prompt: str | list[str] | None = None,
        max_sequence_length: int = 2048,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Upstream's, of the texts in quotes, which most prompts and the empty negative one do not have."""
        key = (*map(tuple, self.get_glyph_texts(prompt)), max_sequence_length, device, dtype)
        embeds = self._glyphs.pop(key, None)
        if embeds is None:
            embeds = super()._get_glyph_embeds(prompt, max_sequence_length, device, dtype)
        self._glyphs[key] = embeds  # the youngest
        while sum(kept.nbytes for kept in self._glyphs.values()) > GLYPH_CACHE_BYTES:
            self._glyphs.popitem(last=False)
        return embeds.view_as(embeds)  # a tensor of this unit: the DiT keeps what it computes from it as long

    def try_step(self, side: int) -> object:
        """See `deployments.engines.acceleration.Pipeline`. Its two passes come one after the other."""
        dit = self.transformer
        latent_side = side // self.vae_scale_factor
        tokens = (latent_side // dit.config.patch_size) ** 2
        floats: dict[str, Any] = {"dtype": dit.dtype, "device": dit.device}
        integers: dict[str, Any] = {"dtype": torch.long, "device": dit.device}
        rotary = torch.empty(tokens, dit.config.attention_head_dim, device=dit.device)
        output: object = dit(
            hidden_states=torch.empty(1, dit.config.in_channels, latent_side, latent_side, **floats),
            encoder_hidden_states=torch.empty(1, 256, dit.config.text_embed_dim, **floats),
            prior_token_id=torch.zeros(1, tokens, **integers),
            prior_token_drop=torch.empty(0, **integers),  # a mask would make shapes depend on contents
            timestep=torch.zeros(1, device=dit.device),
            target_size=torch.zeros(1, 2, **floats),
            crop_coords=torch.zeros(1, 2, **floats),
            image_rotary_emb=(rotary, rotary),  # the DiT would keep its own, which have no contents here
        )
        return output

    def compile(self, options: dict[str, Any]) -> None:
        """See `deployments.engines.acceleration.Pipeline`."""
        self.transformer.compile_blocks(options)

    def source_bytes(self, side: int) -> int:
        """What the DiT keeps of a square source image while the edit is painted: keys and values."""
        config = self.transformer.config
        tokens = (side // self.vae_scale_factor // config.patch_size) ** 2
        width = config.num_attention_heads * config.attention_head_dim
        size: int = 2 * config.num_layers * tokens * width * self.vae.dtype.itemsize
        return size

    def cache_steps(self, threshold: float) -> None:
        """See `deployments.engines.acceleration.Pipeline`.

        diffusers' first-block cache keeps apart what the passes with and without guidance leave, if it is
        told which is which; upstream's pipeline does not tell it.
        """
        # diffusers does not list this block: image first, then text.
        TransformerBlockRegistry.register(
            GlmImageTransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
        )
        forward = self.transformer.forward

        def named(*args: Any, **kwargs: Any) -> Any:
            with self.transformer.cache_context(self._pass_name()):
                return forward(*args, **kwargs)

        self.transformer.forward = named
        self.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    def _pass_name(self) -> str:
        """Upstream's order: a pass for each source image, then in every step two, or one without guidance."""
        step = self._current_timestep
        if step is None:
            self.transformer._reset_stateful_cache()  # no source image is like another one
            return "source"
        name = "unconditional" if step is self._last_step else "conditional"
        self._last_step = step
        return name
