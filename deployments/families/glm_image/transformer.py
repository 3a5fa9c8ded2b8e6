"""Upstream's DiT with caches for results that stay the same during a unit or a step."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers import GlmImageTransformer2DModel
from torch.utils.weak import WeakTensorKeyDictionary

from deployments.families.glm_image.fused_block import KeysValues, Layout, fused_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache, GlmImageLayerKVCache

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the image tokens' angles: shape (tokens, channels of a head) each."""
SIZES_KEPT = 8
"""Number of image sizes whose rotary tables are cached. The tables of 2048×2048 pixels take 17 MB."""


class Transformer(GlmImageTransformer2DModel):  # type: ignore[misc]
    """`GlmImageTransformer2DModel` (diffusers 0.42) for one image at a time: the same results, less work.

    Upstream's pipeline passes the same tensors in every step of a unit. A result that depends on one of them
    is computed once and cached while the tensor lives. The projections of prior tokens and glyphs are cached
    for the unit, and the time embedding for the two passes of a step. Rotary tables are cached for the last
    sizes. Upstream computes them on the CPU in every pass.
    """

    _fused_block: Callable[..., Any] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        prior_token_id: torch.Tensor,
        prior_token_drop: torch.Tensor,
        timestep: torch.Tensor,
        target_size: torch.Tensor,
        crop_coords: torch.Tensor,
        kv_caches: GlmImageKVCache | None = None,
        image_rotary_emb: Rotary | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        """Predicts the velocity of the latents. Upstream's other arguments have no effect on one image.

        Args:
            hidden_states: latents, shape (1, channels, height / 8, width / 8).
            encoder_hidden_states: glyph embeddings, shape (1, text tokens, channels).
            prior_token_id: a token for each 16×16 pixels, shape (1, image tokens) or (image tokens,).
            prior_token_drop: mask of the same shape, true where the token is dropped.
            timestep: time of the step, shape (1,).
            target_size: height and width in pixels, shape (1, 2).
            crop_coords: crop coordinates, shape (1, 2).
            kv_caches: keys and values of source images. They are read or written, depending on the mode.
            image_rotary_emb: rotary tables for uncompiled blocks. By default they are computed from the size.

        Returns:
            The velocity in a tuple. It has the latents' shape.
        """
        height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        device = hidden_states.device
        prior = self._once(prior_token_drop, lambda: self._prior(prior_token_id, prior_token_drop))
        image = self.image_projector(hidden_states) + prior
        text = self._once(encoder_hidden_states, lambda: self.glyph_projector(encoder_hidden_states))
        temb = self._once(
            timestep, lambda: self.time_condition_embed(timestep, target_size, crop_coords, image.dtype)
        )
        caches = kv_caches.caches if kv_caches else [None] * len(self.transformer_blocks)
        if self._fused_block is None:
            rotary = image_rotary_emb or self._rotary_tables((height, width), device)
            image = self._run_blocks(image, text, temb, rotary, caches)
        else:
            layout = self._layouts((height, width), text.shape[1], device)
            image = self._run_fused_blocks(self._fused_block, image, text, temb, layout, caches)
        patches = self.proj_out(self.norm_out(image, temb))
        patches = patches.view(1, height, width, -1, self.config.patch_size, self.config.patch_size)
        return (patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3),)

    def compile_blocks(self, options: dict[str, Any]) -> None:
        """Compiles the blocks in their fused form. All blocks share the same code.

        Lengths are dynamic. All sizes and texts share two graphs, with source images and without.

        Args:
            options: options from `deployments.engines.compilation.options`.
        """
        self._fused_block = torch.compile(fused_block, fullgraph=True, dynamic=True, options=options)

    def _once(self, tensor: torch.Tensor, compute: Callable[[], Any]) -> Any:
        """Returns the result for this tensor object. Computes it the first time."""
        if tensor not in self.kept:
            self.kept[tensor] = compute()
        return self.kept[tensor]

    @cached_property
    def kept(self) -> WeakTensorKeyDictionary:
        """Results by the tensor that they were computed from. A result goes with its tensor."""
        return WeakTensorKeyDictionary()

    @cached_property
    def _rotary_tables(self) -> Callable[[tuple[int, int], torch.device], Rotary]:
        """Function that returns the rotary tables of a grid of image tokens."""
        patch = self.config.patch_size

        def tables(grid: tuple[int, int], device: torch.device) -> Rotary:
            latents = torch.empty(1, 1, *(patch * side for side in grid), device="meta")
            cos, sin = self.rope(latents)
            return cos.to(device), sin.to(device)

        return lru_cache(SIZES_KEPT)(tables)

    @cached_property
    def _layouts(self) -> Callable[[tuple[int, int], int, torch.device], Layout]:
        """Function that returns the layout of text tokens and a grid of image tokens, for the fused form."""

        def layout(grid: tuple[int, int], length: int, device: torch.device) -> Layout:
            # The two halves of a head have the same angles.
            cos, sin = (table.chunk(2, dim=-1)[0] for table in self._rotary_tables(grid, device))
            ones, zeros = cos.new_ones(length, cos.shape[1]), sin.new_zeros(length, sin.shape[1])
            is_text = torch.arange(length + len(cos), device=device)[:, None] < length
            return Layout(is_text, torch.cat([ones, cos]), torch.cat([zeros, sin]))

        return lru_cache(SIZES_KEPT)(layout)

    def _prior(self, token_ids: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        embedding = self.prior_token_embedding(token_ids)
        embedding[drop] *= 0.0
        projected: torch.Tensor = self.prior_projector(embedding)
        return projected

    def _run_blocks(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        rotary: Rotary,
        caches: list[GlmImageLayerKVCache | None],
    ) -> torch.Tensor:
        """Runs upstream's blocks and returns the image's hidden states, shape (1, tokens, width)."""
        for block, cache in zip(self.transformer_blocks, caches, strict=True):
            image, text = block(image, text, temb, rotary, kv_cache=cache)
        return image

    def _run_fused_blocks(
        self,
        fused: Callable[..., Any],
        image: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        layout: Layout,
        caches: list[GlmImageLayerKVCache | None],
    ) -> torch.Tensor:
        """Runs the blocks in their fused form and returns the image's hidden states, like `_run_blocks`."""
        modulations = self._once(
            temb, lambda: [block.norm1.linear(temb)[0] for block in self.transformer_blocks]
        )
        hidden = torch.cat([text[0], image[0]])
        for block, modulation, cache in zip(self.transformer_blocks, modulations, caches, strict=True):
            hidden, own = fused(block, hidden, modulation, layout, _sources(cache))
            if cache is not None and cache.mode == "write":
                cache.store(own.keys[None], own.values[None])
        return hidden[None, text.shape[1] :]


def _sources(cache: GlmImageLayerKVCache | None) -> KeysValues | None:
    """Returns the keys and values of source images that a block may read, or None."""
    if cache is None or cache.mode != "read":
        return None
    return KeysValues(cache.k_caches[0][0], cache.v_caches[0][0])
