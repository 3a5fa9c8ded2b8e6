"""Attention of the language model on an accelerator: one product for its inputs, and fused over blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.models.glm_image.modeling_glm_image import apply_rotary_pos_emb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

BLOCK = 128
"""Positions that the attention reads, or skips, at a time. A row is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class GPUSlots:
    """Where each line of a pass writes in one layer's cache, and what it may read there.

    A decoding pass has a line for each row, and a prompt's slice is one line. Its row is found in the cache
    of all rows by its position, so that the row may be a tensor and is not copied.

    Attributes:
        keys: shape (lines, heads, positions, channels). The positions are those of one row, or of all rows.
        values: shape (lines, heads, positions, channels).
        firsts: where each line's row begins: shape (lines,). None if at 0, all of them.
        starts: each line's first position that is written: shape (lines,).
        blocks: number of blocks that each line reads: shape (lines, 1, 1), int32.
        indices: numbers of blocks, those of each line's row first: shape (lines, 1, 1, blocks), int32.
    """

    keys: torch.Tensor
    values: torch.Tensor
    firsts: torch.Tensor | None
    starts: torch.Tensor
    blocks: torch.Tensor
    indices: torch.Tensor

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values of shape (lines, heads, tokens, channels)."""
        lines = torch.arange(keys.shape[0], device=keys.device)[:, None]
        at = self.starts[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[lines, :, at] = keys.transpose(1, 2)
        self.values[lines, :, at] = values.transpose(1, 2)

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Causal attention of each line over its own row.

        How a row's blocks are divided among the processors depends on that row alone.

        Args:
            query: shape (lines, heads, tokens, channels).
            scaling: factor of the products.

        Returns:
            Shape (lines, heads, tokens, channels).
        """

        def is_seen(
            line: torch.Tensor, head: torch.Tensor, query_at: torch.Tensor, key_at: torch.Tensor
        ) -> torch.Tensor:
            seen = key_at <= self.starts[line] + query_at
            return seen if self.firsts is None else seen & (key_at >= self.firsts[line])

        block_mask = BlockMask.from_kv_blocks(
            self.blocks,
            self.indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=is_seen,
            seq_lengths=(query.shape[2], self.keys.shape[2]),
            compute_q_blocks=False,
        )
        attended = flex_attention(
            query, self.keys, self.values, block_mask=block_mask, scale=scaling, enable_gqa=True
        )
        assert isinstance(attended, torch.Tensor)  # noqa: S101 - no auxiliary output is asked for
        return attended


def blocks_until(ends: torch.Tensor) -> torch.Tensor:
    """Returns the number of blocks that hold the positions before `ends`: int32, of the same shape."""
    return ((ends + BLOCK - 1) // BLOCK).to(torch.int32)


class FusedAttention(nn.Module):
    """Upstream's attention with one product for queries, keys and values.

    Args:
        attention: upstream's `GlmImageTextAttention`. Its output projection is shared, the others are copied.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._widths = [part.out_features for part in parts]
        self._channels = attention.head_dim
        self._scaling = attention.scaling
        self.qkv_proj = _fused(parts)
        self.o_proj = attention.o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: GPUSlots,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Applies the attention; called by upstream's layer.

        Args:
            hidden_states: shape (lines, tokens, width).
            position_embeddings: cosines and sines, each of shape (lines, tokens, rotary channels).
            past_key_values: the layer's cache.

        Returns:
            Shape (lines, tokens, width), and None for the weights.
        """
        shape = (*hidden_states.shape[:-1], -1, self._channels)
        query, keys, values = (
            part.view(shape).transpose(1, 2)
            for part in self.qkv_proj(hidden_states).split(self._widths, dim=-1)
        )
        query, keys = apply_rotary_pos_emb(query, keys, *position_embeddings)
        past_key_values.write(keys, values)
        attended = past_key_values.attend(query, self._scaling).transpose(1, 2)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), None


def fuse_projections(model: GlmImageForConditionalGeneration) -> None:
    """Replaces the attention of each layer by `FusedAttention`, with a second copy of one layer at a time."""
    for layer in model.model.language_model.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the old weights' memory has other sizes than what comes next


@torch.no_grad()
def _fused(parts: Sequence[nn.Linear]) -> nn.Linear:
    """Returns one layer whose outputs are those of several, one after the other."""
    biased = parts[0].bias is not None
    fused = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), biased, device="meta")
    fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if biased:
        fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return fused
