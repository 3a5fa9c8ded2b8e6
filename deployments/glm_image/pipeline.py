"""Upstream's pipeline, doing nothing twice."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers import GlmImagePipeline
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer, T5EncoderModel

GLYPH_CACHE_BYTES = 256 * 2**20
"""Of the device's memory; a short text takes some kilobytes, the longest prompt about 100 MB."""


class DecoderPipeline(GlmImagePipeline):  # type: ignore[misc]
    """`GlmImagePipeline` (diffusers 0.42) for prior tokens that were made elsewhere: the same pixels.

    Glyph embeddings and rotary tables are kept: upstream makes the latter anew on the CPU for every forward
    pass and copies them to the device in every layer. The step's callback may ask for the predicted
    velocity, as `noise_pred`.
    """

    _callback_tensor_inputs = (*GlmImagePipeline._callback_tensor_inputs, "noise_pred")

    def __init__(  # diffusers reads the names of the components from here
        self,
        tokenizer: ByT5Tokenizer,
        processor: None,
        text_encoder: T5EncoderModel,
        vision_language_encoder: None,
        vae: AutoencoderKL,
        transformer: GlmImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__(
            tokenizer, processor, text_encoder, vision_language_encoder, vae, transformer, scheduler
        )
        self._last_step: torch.Tensor | None = None
        self._glyphs: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self.transformer.rope = _KeptRotaryTables(self.transformer.rope)
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
        return embeds

    def name_passes(self) -> None:
        """Tell a step cache which forward pass is which, so that it compares each with its like."""
        forward = self.transformer.forward

        def named(*args: Any, **kwargs: Any) -> Any:
            with self.transformer.cache_context(self._pass_name()):
                return forward(*args, **kwargs)

        self.transformer.forward = named

    def _pass_name(self) -> str:
        """Upstream's order: a pass for each source image, then in every step two, or one without guidance."""
        step = self._current_timestep
        if step is None:
            self.transformer._reset_stateful_cache()  # no source image is like another one
            return "source"
        name = "unconditional" if step is self._last_step else "conditional"
        self._last_step = step
        return name


class _KeptRotaryTables(nn.Module):
    """Upstream's rotary tables, on the device where they are used, kept for the last few sizes."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self._tables = lru_cache(maxsize=8)(
            lambda shape, device: tuple(table.to(device) for table in rope(torch.empty(shape, device="meta")))
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for latents of shape (batch, channels, height, width)."""
        tables: tuple[torch.Tensor, torch.Tensor] = self._tables(hidden_states.shape, hidden_states.device)
        return tables
