"""The DiT's block in a form that compiles to few kernels: the same sums, less memory traffic.

Upstream's block (diffusers 0.42) keeps image and text apart. It assigns rotated values to slices and runs its
feed-forward twice. Compiled, each costs a pass over activations or weights. See `tests/benchmarks/kernels.py`
for the launches and bytes of both forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

if TYPE_CHECKING:
    from diffusers.models.attention import FeedForward
    from diffusers.models.transformers.transformer_glm_image import GlmImageTransformerBlock


class Layout(NamedTuple):
    """Positions of text and image tokens in one sequence, text first.

    Attributes:
        is_text: mask of the text tokens, shape (tokens, 1).
        cos: cosines of the tokens' angles, shape (tokens, channels of a head / 2). The text's angles are 0.
        sin: sines of the same angles.
    """

    is_text: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class KeysValues(NamedTuple):
    """Keys and values of source images in one block: shape (tokens, heads, channels) each."""

    keys: torch.Tensor
    values: torch.Tensor


def fused_block(
    block: GlmImageTransformerBlock,
    hidden: torch.Tensor,
    modulation: torch.Tensor,
    layout: Layout,
    sources: KeysValues | None,
) -> tuple[torch.Tensor, KeysValues]:
    """Runs one block for one image.

    Text and image are one sequence, so that there is one length. With several lengths, the compiler does not
    know which are equal and fuses less. There is no batch dimension: its stride would depend on the origin
    of a tensor, and each stride would have its own graph.

    Args:
        block: upstream's block, for its weights.
        hidden: hidden states of text and image, shape (tokens, width).
        modulation: the twelve shifts, scales and gates of this step, shape (12 × width,).
        layout: positions of the tokens.
        sources: keys and values of source images, which the tokens attend to as well.

    Returns:
        The next hidden states, and the tokens' own keys and values.
    """
    # Upstream's order is shift, scale and gate of the attention, then of the feed-forward. Each is a pair:
    # the image's and the text's.
    pairs = zip(*[iter(modulation.chunk(12))] * 2, strict=True)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (
        torch.where(layout.is_text, text, image) for image, text in pairs
    )
    attended, own = _attention(block, block.norm1.norm(hidden) * (1 + scale) + shift, layout, sources)
    hidden = hidden + attended * gate
    fed = _feed_forward(block.ff, block.norm2(hidden) * (1 + ff_scale) + ff_shift)
    return hidden + fed * ff_gate, own


def _attention(
    block: GlmImageTransformerBlock, hidden: torch.Tensor, layout: Layout, sources: KeysValues | None
) -> tuple[torch.Tensor, KeysValues]:
    attention = block.attn1
    query, key, value = (
        project(hidden).unflatten(1, (attention.heads, -1))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    query = _rotate(attention.norm_q(query), layout)
    own = KeysValues(_rotate(attention.norm_k(key), layout), value)
    keys, values = own
    if sources is not None:
        keys, values = (torch.cat(both) for both in zip(sources, own, strict=True))
    backend = attention.processor._attention_backend
    attended = dispatch_attention_fn(query[None], keys[None], values[None], backend=backend)[0]
    projected: torch.Tensor = attention.to_out[0](attended.flatten(1, 2))
    return projected, own


def _rotate(states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rotates each pair of channels. A pair has the same index in the two halves of a head."""
    cos, sin = layout.cos[:, None], layout.sin[:, None]
    real, imaginary = states.float().chunk(2, dim=-1)
    rotated = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return rotated.to(states.dtype)


def _feed_forward(feed_forward: FeedForward, hidden: torch.Tensor) -> torch.Tensor:
    """Applies upstream's feed-forward. On a GPU, GELU is computed inside the first product."""
    activation, _, second = feed_forward.net  # the middle one is dropout, for training
    first = activation.proj
    # On a CPU the operator computes the exact GELU, not the approximation that the model was trained with.
    if hidden.device.type == "cuda" and type(first) is nn.Linear:
        hidden = torch.ops.aten._addmm_activation(first.bias, hidden, first.weight.t(), use_gelu=True)
    else:
        hidden = activation(hidden)
    output: torch.Tensor = second(hidden)
    return output
