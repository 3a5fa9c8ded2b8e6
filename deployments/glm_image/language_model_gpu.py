"""The language model on an accelerator: fixed shapes, compiled layers, the decoding pass one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from deployments.glm_image.language_model import SLICE_TOKENS, LanguageModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import GlmImageForConditionalGeneration

ATTENTION = "glm_image_rows_gpu"

BLOCK = 128
"""Positions that the attention reads, or skips, at a time. A multiple of it are a row's."""


@dataclass(frozen=True, kw_only=True)
class GPUSlots:
    """See `Slots`: rows of the cache, and in which blocks of them there is something to read.

    Attributes:
        keys: shape (rows, heads, positions, channels).
        values: likewise.
        starts: each row's first position that is written: shape (rows,).
        blocks: how many blocks of each row are read: shape (rows, 1, 1), int32.
        indices: which those are: shape (rows, 1, 1, blocks), int32.
    """

    keys: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    blocks: torch.Tensor
    indices: torch.Tensor

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slots`."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        at = self.starts[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[rows, :, at] = keys.transpose(1, 2)
        self.values[rows, :, at] = values.transpose(1, 2)
        return self.keys, self.values


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    slots: GPUSlots,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row over its own blocks, fused; how a row's are divided depends on them alone.

    Arguments and result are those of `language_model_cpu.rows_attention`.
    """

    def is_seen(
        row: torch.Tensor, head: torch.Tensor, query_at: torch.Tensor, key_at: torch.Tensor
    ) -> torch.Tensor:
        return key_at <= slots.starts[row] + query_at

    block_mask = BlockMask.from_kv_blocks(
        slots.blocks,
        slots.indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=is_seen,
        seq_lengths=(query.shape[2], keys.shape[2]),
        compute_q_blocks=False,
    )
    attended = flex_attention(query, keys, values, block_mask=block_mask, scale=scaling, enable_gqa=True)
    assert isinstance(attended, torch.Tensor)  # noqa: S101 - no auxiliary output is asked for
    return attended.transpose(1, 2), None


AttentionInterface.register(ATTENTION, rows_attention)


def blocks_until(ends: torch.Tensor) -> torch.Tensor:
    """How many blocks hold the positions before `ends`: int32, of the same shape."""
    return ((ends + BLOCK - 1) // BLOCK).to(torch.int32)


class GPULanguageModel(LanguageModel):
    """See `LanguageModel`.

    Every decoding pass computes all rows at one shape, so that a row's arithmetic does not depend on which
    others are in use. The host hands passes over without waiting for their results, two of them ahead at
    most, so that it can still take a request back.
    """

    fixed_shape = True

    def __init__(self, model: GlmImageForConditionalGeneration, *, rows: int, row_tokens: int) -> None:
        blocks = -(-row_tokens // BLOCK)
        super().__init__(model, rows=rows, row_tokens=blocks * BLOCK, attention=ATTENTION)
        self._indices = torch.arange(blocks, dtype=torch.int32, device=self._device).repeat(rows, 1, 1, 1)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=self._device)
        self._where = torch.zeros(4, rows, dtype=torch.long, device=self._device)
        self._decoded: torch.Tensor | None = None
        for layer in self._layers.layers:
            # The compiler would make code for every number anew; here each layer has a cache of its own.
            layer.self_attn.layer_idx = 0
            layer.compile(fullgraph=True, dynamic=False)
        with torch.inference_mode():
            nothing = torch.zeros(1, dtype=torch.long)
            self.prefill(0, 0, nothing, nothing.expand(3, 1))
            self._graph = self._capture() if self._device.type == "cuda" else None
        self._handed_over: list[torch.cuda.Event] = []

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel`."""
        last = len(tokens) - 1
        # Whatever the slice is filled up with is written over before it is read.
        filled = torch.zeros(4, SLICE_TOKENS, dtype=torch.long)
        filled[0, : last + 1] = tokens
        filled[1:, : last + 1] = positions
        filled = self._to_device(filled)
        starts = self._to_device(torch.tensor([start]))
        hidden = self._pass(filled[:1], filled[1:, None], starts, slice(row, row + 1))
        return self._logits(hidden[:, last])

    def decode(
        self, rows: list[int], starts: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `LanguageModel`."""
        self._tokens.copy_(tokens)
        self._where.copy_(self._to_device(torch.cat([torch.tensor([starts]), positions])))
        if self._graph is None:
            return self._decode()
        if len(self._handed_over) == 2:
            self._handed_over.pop(0).synchronize()
        self._graph.replay()
        event = torch.cuda.Event()
        event.record()
        self._handed_over.append(event)
        assert self._decoded is not None  # noqa: S101 - made when the graph was
        return self._decoded

    def recover(self) -> None:
        """See `LanguageModel`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a device that is lost raises the same error for ever
            torch.cuda.empty_cache()

    def _decode(self) -> torch.Tensor:
        starts, positions = self._where[0], self._where[1:, :, None]
        return self._logits(self._pass(self._tokens[:, None], positions, starts, slice(None))[:, -1])

    def _pass(
        self, tokens: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        blocks = blocks_until(starts + tokens.shape[1]).view(-1, 1, 1)
        return self._forward(
            tokens,
            positions,
            lambda keys, values: GPUSlots(
                keys=keys[rows],
                values=values[rows],
                starts=starts,
                blocks=blocks,
                indices=self._indices[rows],
            ),
        )

    @torch.inference_mode()
    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the decoding pass, after runs beside it in which the libraries set themselves up."""
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._decode()
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decoded = self._decode()
        return graph

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy without waiting: from pinned memory, which torch keeps until the copy is done."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
