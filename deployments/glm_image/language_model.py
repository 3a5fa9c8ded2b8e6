"""Upstream's language model over a key/value cache with one row a request."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

logger = logging.getLogger("ray.serve")

ATTENTION = "glm_image_rows"


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where one forward pass writes: each of its rows, and from which position on.

    It goes through upstream's layers twice: as their cache, and as an argument of the attention.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rows: list[int]
    starts: list[int]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of shape (rows, heads, tokens, channels); called by upstream's attention."""
        tokens = keys.shape[2]
        for i, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            self.keys[layer][row, :, start : start + tokens] = keys[i]
            self.values[layer][row, :, start : start + tokens] = values[i]
        return self.keys[layer], self.values[layer]


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    slots: Slots,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row over its own keys and no more, so that no row feels another.

    Args:
        module: upstream's attention, unused.
        query: shape (rows, heads, tokens, channels).
        keys: the layer's cache: shape (all rows, key/value heads, positions, channels).
        values: likewise.
        mask: None; the slots say it.
        scaling: of the products.
        slots: which rows of the cache, and where their tokens begin.

    Returns:
        Shape (rows, tokens, heads, channels), and None for the weights.
    """
    batch, heads, tokens, channels = query.shape
    groups = keys.shape[1]
    output = query.new_empty(batch, tokens, heads, channels)
    for i, (row, start) in enumerate(zip(slots.rows, slots.starts, strict=True)):
        end = start + tokens
        key, value = keys[row, :, :end], values[row, :, :end]
        if tokens == 1:
            # The heads that share keys become one head's queries: nothing is copied.
            grouped = query[i].view(1, groups, heads // groups, channels)
            attended = scaled_dot_product_attention(grouped, key[None], value[None], scale=scaling)
            output[i, 0] = attended.reshape(heads, channels)
        else:
            causal = torch.ones(tokens, end, dtype=torch.bool, device=query.device).tril(start)
            attended = scaled_dot_product_attention(
                query[i : i + 1], key[None], value[None], attn_mask=causal, scale=scaling, enable_gqa=True
            )
            output[i] = attended[0].transpose(0, 1)
    return output, None


AttentionInterface.register(ATTENTION, rows_attention)


class PackedLinear(nn.Module):
    """A linear layer for few rows on a CPU, its weights laid out ahead by oneDNN.

    Several times as fast as `nn.Linear` for eight rows, and a row's result is the same to the last bit
    whatever other rows there are, which `nn.Linear`'s is not. The operators are those that
    `torch.compile` puts in place of `nn.Linear` when it freezes a model for the CPU.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the layer to inputs of shape (…, features)."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self._bias, "none", [], ""
        )
        return outputs


class LanguageModel:
    """Runs the layers for a prompt's slice in one row, or for one token in each of several rows.

    Args:
        model: upstream's; its language model's layers are changed for this use.
        rows: how many requests there may be at once.
        row_tokens: how many tokens a row holds.
    """

    def __init__(self, model: GlmImageForConditionalGeneration, *, rows: int, row_tokens: int) -> None:
        self._layers = model.model.language_model
        self._head = model.lm_head
        self._device = model.device
        config = self._layers.config
        config._attn_implementation = ATTENTION
        channels = config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, row_tokens, channels)
        self._keys, self._values = (
            [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in self._layers.layers]
            for _ in range(2)
        )
        if (model.device.type, model.dtype) == (
            "cpu",
            torch.float32,
        ) and torch.backends.mkldnn.is_available():
            _pack(self._layers, rows)
            self._head = PackedLinear(model.lm_head, rows)

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read a slice of a prompt: ids of shape (n,) and positions of shape (3, n), from `start` on.

        Returns:
            The logits after its last token: shape (1, vocabulary), float32.
        """
        hidden = self._forward(tokens[None], positions[:, None], rows=[row], starts=[start])
        return self._logits(hidden[:, -1])

    def decode(
        self, rows: list[int], starts: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Read one token in each row: ids of shape (rows,), positions of shape (3, rows).

        Returns:
            The logits after each: shape (rows, vocabulary), float32.
        """
        hidden = self._forward(tokens[:, None], positions[:, :, None], rows=rows, starts=starts)
        return self._logits(hidden[:, -1])

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, *, rows: list[int], starts: list[int]
    ) -> torch.Tensor:
        slots = Slots(keys=self._keys, values=self._values, rows=rows, starts=starts)
        hidden = self._layers.embed_tokens(tokens.to(self._device))
        rotary = self._layers.rotary_emb(hidden, position_ids=positions.to(self._device))
        for layer in self._layers.layers:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=slots, slots=slots)
        normed: torch.Tensor = self._layers.norm(hidden)
        return normed

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden)
        return logits.float()


def _pack(module: nn.Module, rows: int) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, rows))
        else:
            _pack(child, rows)
