"""The language model on a CPU: only the rows that have a token to read, their weights packed by oneDNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deployments.glm_image.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

ATTENTION = "glm_image_rows_cpu"


@dataclass(frozen=True, kw_only=True)
class CPUSlots:
    """See `Slots`: each of the rows, and from which position on it is written."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: list[int]
    starts: list[int]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slots`."""
        tokens = keys.shape[2]
        for i, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            self.keys[row, :, start : start + tokens] = keys[i]
            self.values[row, :, start : start + tokens] = values[i]
        return self.keys, self.values


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    slots: CPUSlots,
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
            causal = torch.ones(tokens, end, dtype=torch.bool).tril(start)
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


class CPULanguageModel(LanguageModel):
    """See `LanguageModel`."""

    fixed_shape = False

    def __init__(self, model: GlmImageForConditionalGeneration, *, rows: int, row_tokens: int) -> None:
        super().__init__(model, rows=rows, row_tokens=row_tokens, attention=ATTENTION)
        if model.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            _pack(self._layers, rows)
            self._head = PackedLinear(model.lm_head, rows)

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel`."""
        hidden = self._forward(
            tokens[None],
            positions[:, None],
            lambda keys, values: CPUSlots(keys=keys, values=values, rows=[row], starts=[start]),
        )
        return self._logits(hidden[:, -1])

    def decode(
        self, rows: list[int], starts: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `LanguageModel`."""
        hidden = self._forward(
            tokens[:, None],
            positions[:, :, None],
            lambda keys, values: CPUSlots(keys=keys, values=values, rows=rows, starts=starts),
        )
        return self._logits(hidden[:, -1])


def _pack(module: nn.Module, rows: int) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, rows))
        else:
            _pack(child, rows)
