"""The DiT's attention with rotary embeddings in real numbers, for the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class RealRotaryAttention(ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """`ZSingleStreamAttnProcessor` (diffusers 0.42) without complex numbers: equal results up to rounding.

    The compiler generates no code for complex numbers. It would call upstream's multiplication unchanged,
    with copies to and from float32 around it.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Applies attention over one sequence of text and image.

        Args:
            attn: upstream's module, for its weights.
            hidden_states: shape (lines, tokens, width).
            encoder_hidden_states: None, because text and image are one sequence.
            attention_mask: mask of the tokens, shape (lines, tokens), or None if no token is masked.
            freqs_cis: rotations as complex numbers, shape (lines, tokens, channels of a head / 2).

        Returns:
            The attended states, shape (lines, tokens, width).
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if freqs_cis is not None:
            cos, sin = torch.view_as_real(freqs_cis).unsqueeze(2).unbind(-1)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else attention_mask[:, None, None, :],
            backend=self._attention_backend,
        )
        projected: torch.Tensor = attn.to_out[0](attended.flatten(2, 3))
        return projected


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of neighbouring channels."""
    real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(3).to(states.dtype)
