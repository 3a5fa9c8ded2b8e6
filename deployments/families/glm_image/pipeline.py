"""Upstream's pipeline with caches, so that nothing is computed twice."""

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
"""Bytes of device memory for glyph embeddings. A short text takes some KB, the longest prompt ~100 MB."""


class DecoderPipeline(GlmImagePipeline):  # type: ignore[misc]
    """`GlmImagePipeline` (diffusers 0.42) for prior tokens from the prior stage: the same pixels.

    Glyph embeddings are cached for the next unit with the same text. The step callback may request the
    predicted velocity as `noise_pred`.
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
        # Quoted text may contain strings like `</s>`. They are letters to be painted, not control tokens.
        self.tokenizer.split_special_tokens = True
        self.set_progress_bar_config(disable=True)

    def _get_glyph_embeds(
        self,
        prompt: str | list[str] | None = None,
        max_sequence_length: int = 2048,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Returns upstream's embeddings of the quoted texts, from the cache if they are there.

        Most prompts and the empty negative prompt have no quoted text.
        """
        key = (*map(tuple, self.get_glyph_texts(prompt)), max_sequence_length, device, dtype)
        embeds = self._glyphs.pop(key, None)
        if embeds is None:
            embeds = super()._get_glyph_embeds(prompt, max_sequence_length, device, dtype)
        self._glyphs[key] = embeds  # the most recently used
        while sum(kept.nbytes for kept in self._glyphs.values()) > GLYPH_CACHE_BYTES:
            self._glyphs.popitem(last=False)
        # A new tensor for this unit: the DiT keeps results computed from a tensor as long as it lives.
        return embeds.view_as(embeds)

    def try_step(self, side: int) -> object:
        """Implements `deployments.engines.acceleration.Pipeline.try_step`.

        The step's two passes run one after the other, so that one pass is enough to measure.
        """
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
            image_rotary_emb=(rotary, rotary),  # otherwise the DiT would cache tables without contents
        )
        return output

    def compile(self, options: dict[str, Any]) -> None:
        """Implements `deployments.engines.acceleration.Pipeline.compile`."""
        self.transformer.compile_blocks(options)

    def source_bytes(self, side: int) -> int:
        """Returns the bytes of keys and values that the DiT keeps of a square source image during an edit."""
        config = self.transformer.config
        tokens = (side // self.vae_scale_factor // config.patch_size) ** 2
        width = config.num_attention_heads * config.attention_head_dim
        size: int = 2 * config.num_layers * tokens * width * self.vae.dtype.itemsize
        return size

    def cache_steps(self, threshold: float) -> None:
        """Implements `deployments.engines.acceleration.Pipeline.cache_steps`.

        diffusers' first-block cache separates the passes with and without guidance only if each pass is
        named. Upstream's pipeline does not name them.
        """
        # diffusers does not register this block. It returns the image first, then the text.
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
        """Returns the name of the next pass.

        Upstream runs one pass for each source image. Then each step has two passes, or one without guidance.
        """
        step = self._current_timestep
        if step is None:
            self.transformer._reset_stateful_cache()  # source images differ from each other
            return "source"
        name = "unconditional" if step is self._last_step else "conditional"
        self._last_step = step
        return name
