"""The language model on a CPU: it computes only rows with a token to read, with weights packed by oneDNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deployments.families.glm_image.language_model import LanguageModel
from deployments.families.glm_image.versions import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

    from deployments.families.glm_image.language_model import Line

ATTENTION = "glm_image_rows_cpu"


@dataclass(frozen=True, kw_only=True)
class CPUSlots:
    """Read and write positions of one forward pass in one layer's cache.

    Upstream's attention takes it twice: as its cache, and as an argument that it passes to the attention
    function.

    Attributes:
        keys: the layer's cached keys: shape (heads, all rows, positions, channels).
        values: the layer's cached values: shape (heads, all rows, positions, channels).
        rows: indices of the rows of the pass.
        starts: first position that the pass writes in each of these rows.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: list[int]
    starts: list[int]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of shape (rows, heads, tokens, channels). Returns the layer's cache."""
        tokens = keys.shape[2]
        for i, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            self.keys[:, row, start : start + tokens] = keys[i]
            self.values[:, row, start : start + tokens] = values[i]
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
    """Applies causal attention of each row over its own keys only, so that rows do not affect each other.

    Args:
        module: upstream's attention, unused.
        query: shape (rows, heads, tokens, channels).
        keys: the layer's cached keys: shape (key/value heads, all rows, positions, channels).
        values: the layer's cached values: shape (key/value heads, all rows, positions, channels).
        mask: None, because the slots replace it.
        scaling: factor of the dot products.
        slots: the rows of the pass, and the start of their tokens in the cache.

    Returns:
        The attended values, shape (rows, tokens, heads, channels), and None for the attention weights.
    """
    batch, heads, tokens, channels = query.shape
    groups = keys.shape[0]
    output = query.new_empty(batch, tokens, heads, channels)
    for i, (row, start) in enumerate(zip(slots.rows, slots.starts, strict=True)):
        end = start + tokens
        key, value = keys[:, row, :end], values[:, row, :end]
        if tokens == 1:
            # Heads that share keys become the queries of one head, so that nothing is copied.
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
    """A linear layer for few rows on a CPU, with weights that oneDNN has laid out in advance.

    For eight rows it is several times as fast as `nn.Linear`. A row's result does not depend on the other
    rows, to the last bit. The result of `nn.Linear` does. The operators are those that `torch.compile` uses
    for `nn.Linear` when it freezes a model for the CPU.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the layer to inputs of shape (…, features)."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self._bias, "none", [], ""
        )
        return outputs


class CPULanguageModel(LanguageModel):
    """The `LanguageModel` for CPUs."""

    def __init__(
        self, model: GlmImageForConditionalGeneration, *, rows: int, max_sequence_length: int
    ) -> None:
        super().__init__(model, rows=rows, max_sequence_length=max_sequence_length)
        self._layers.config._attn_implementation = ATTENTION
        self._head = model.lm_head
        if model.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            _pack(self._layers, rows)
            self._head = PackedLinear(model.lm_head, rows)

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Implements `LanguageModel.prefill`."""
        return self._forward(tokens[None], positions[:, None], [row], [start])

    def decode(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        """Implements `LanguageModel.decode`."""
        drawing = [line for line in lines if line.generator]
        rows = [line.row for line in drawing]
        logits = self._forward(
            self._tokens[rows, None].clamp(min=0),
            torch.stack([line.position for line in drawing], dim=1)[:, :, None],
            rows,
            [line.start for line in drawing],
        )
        drawn = self._sampler.draw(
            logits, [line.generator for line in drawing], [line.in_target for line in drawing]
        )
        self._tokens[rows] = drawn
        return list(drawn)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: list[int], starts: list[int]
    ) -> torch.Tensor:
        """Runs the layers.

        Args:
            tokens: ids of shape (rows, n).
            positions: rotary positions of shape (3, rows, n).
            rows: indices of the rows of the cache.
            starts: start of the tokens in each of these rows.

        Returns:
            The logits after each row's last token: shape (rows, vocabulary), float32.
        """
        hidden = self._layers.embed_tokens(tokens)
        rotary = self._layers.rotary_emb(hidden, position_ids=positions)
        for layer, (keys, values) in zip(self._layers.layers, self.caches, strict=True):
            slots = CPUSlots(keys=keys, values=values, rows=rows, starts=starts)
            hidden = layer(hidden, position_embeddings=rotary, slots=slots, **{CACHE: slots})
        logits: torch.Tensor = self._head(self._layers.norm(hidden)[:, -1])
        return logits.float()


def _pack(module: nn.Module, rows: int) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, rows))
        else:
            _pack(child, rows)
