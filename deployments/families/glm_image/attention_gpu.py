"""Attention of the language model on an accelerator: one input projection, and block-wise fused attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.models.glm_image.modeling_glm_image import apply_rotary_pos_emb

from deployments.families.glm_image.versions import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

BLOCK = 128
"""Number of positions that the attention reads or skips at a time. A row's length is a multiple of it."""


ONE_TOKEN: Any = {"SPLIT_KV": 8}
"""Options of the attention of single tokens: among how many processors a line's blocks are divided.

By default the number depends on the GPU and on the number of lines, and is two for 64 lines on an H200. Then
long rows would be slow, and rounding would depend on the number of lines.
"""


@dataclass(frozen=True, kw_only=True)
class GPUSlots:
    """Read and write positions of each line of a pass in one layer's cache.

    A decoding pass has several lines of one token for each row. A prompt's slice is a single line. Positions
    are those in the cache of all rows, in sequence. So a row may be a tensor, and no row is copied.

    Attributes:
        keys: shape (heads, positions, channels).
        values: shape (heads, positions, channels).
        firsts: start of each line's row: shape (lines,).
        starts: first position that each line writes: shape (lines,).
        blocks: number of blocks that each line reads: shape (lines, 1, 1), int32.
        indices: indices of the blocks of each line's row: shape (lines, 1, 1, blocks), int32.
    """

    keys: torch.Tensor
    values: torch.Tensor
    firsts: torch.Tensor
    starts: torch.Tensor
    blocks: torch.Tensor
    indices: torch.Tensor

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values of shape (lines, heads, tokens, channels).

        Values that are not finite are replaced, so that a wrong draft does not spoil the lines before it:
        they mask its value, and zero times NaN is NaN. The line itself still ends in NaN, by its query.
        """
        at = self.starts[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[:, at.flatten()] = keys.transpose(0, 1).flatten(1, 2)
        self.values[:, at.flatten()] = values.nan_to_num().transpose(0, 1).flatten(1, 2)

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Applies causal attention of each line over its own row.

        The division of a line's blocks among the processors depends on that line alone.

        Args:
            query: shape (lines, heads, tokens, channels).
            scaling: factor of the dot products.

        Returns:
            Shape (lines, heads, tokens, channels).
        """

        def is_seen(
            line: torch.Tensor, head: torch.Tensor, query_at: torch.Tensor, key_at: torch.Tensor
        ) -> torch.Tensor:
            return (key_at <= self.starts[line] + query_at) & (key_at >= self.firsts[line])

        block_mask = BlockMask.from_kv_blocks(
            self.blocks,
            self.indices,
            BLOCK_SIZE=BLOCK,
            mask_mod=is_seen,
            seq_lengths=(query.shape[2], self.keys.shape[1]),
            compute_q_blocks=False,
        )
        attended = flex_attention(
            query,
            self.keys[None],
            self.values[None],
            block_mask=block_mask,
            scale=scaling,
            enable_gqa=True,
            kernel_options=ONE_TOKEN if query.shape[2] == 1 else None,
        )
        assert isinstance(attended, torch.Tensor)  # noqa: S101 - no auxiliary output is requested
        return attended


def blocks_until(ends: torch.Tensor) -> torch.Tensor:
    """Returns the number of blocks that hold the positions before `ends`: int32, of the same shape."""
    return ((ends + BLOCK - 1) // BLOCK).to(torch.int32)


class FusedAttention(nn.Module):
    """Upstream's attention with one product for queries, keys and values.

    Args:
        attention: upstream's `GlmImageTextAttention`. Its output projection is shared; the others are copied.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._widths = [part.out_features for part in parts]
        self._channels = attention.head_dim
        self._scaling = attention.scaling
        self.qkv_proj = fused(parts)
        self.o_proj = attention.o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Applies the attention. Called by upstream's layer.

        Args:
            hidden_states: shape (lines, tokens, width).
            position_embeddings: cosines and sines, each of shape (lines, tokens, rotary channels).
            others: further arguments; `CACHE` is the layer's cache.

        Returns:
            The next hidden states, shape (lines, tokens, width), and None for the attention weights.
        """
        shape = (*hidden_states.shape[:-1], -1, self._channels)
        query, keys, values = (
            part.view(shape).transpose(1, 2)
            for part in self.qkv_proj(hidden_states).split(self._widths, dim=-1)
        )
        query, keys = apply_rotary_pos_emb(query, keys, *position_embeddings)
        slots: GPUSlots = others[CACHE]
        slots.write(keys, values)
        attended = slots.attend(query, self._scaling).transpose(1, 2)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), None


def fuse_projections(model: GlmImageForConditionalGeneration) -> None:
    """Replaces the attention of each layer by `FusedAttention`. At most one layer exists twice at a time."""
    for layer in model.model.language_model.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # later allocations have other sizes than the freed weights


@torch.no_grad()
def fused(parts: Sequence[nn.Linear]) -> nn.Linear:
    """Returns one layer whose output is the concatenated outputs of several layers."""
    biased = parts[0].bias is not None
    joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), biased, device="meta")
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if biased:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined
