"""The language model on an accelerator: fixed shapes, compiled parts, a CUDA graph for each kind of pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deployments.engines import compilation
from deployments.families.glm_image.attention_gpu import BLOCK, GPUSlots, blocks_until, fuse_projections
from deployments.families.glm_image.cuda_graphs import CUDAGraphs
from deployments.families.glm_image.language_model import SLICE_TOKENS, LanguageModel
from deployments.families.glm_image.sampling_gpu import CandidateSampler
from deployments.families.glm_image.versions import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

    from deployments.families.glm_image.language_model import Line


class Entry(nn.Module):
    """The part before the layers: embeddings, rotary angles, and the number of cache blocks to read.

    Args:
        layers: upstream's `GlmImageTextModel`.
    """

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.embed_tokens = layers.embed_tokens
        self.rotary_emb = layers.rotary_emb

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, firsts: torch.Tensor | None, starts: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Prepares a pass.

        Args:
            tokens: ids of shape (lines, n). `UNSOUND` is read as 0.
            positions: rotary positions of shape (3, lines, n).
            firsts: start of each line's row in the cache: shape (lines,). None if every row starts at 0.
            starts: start of each line's tokens in its row: shape (lines,).

        Returns:
            The first layer's input, and the cosines and sines. Also the start of each line's tokens in the
            cache, and the number of blocks that each line reads.
        """
        hidden = self.embed_tokens(tokens.clamp(min=0))
        rotary = self.rotary_emb(hidden, position_ids=positions)
        blocks = blocks_until(starts + tokens.shape[1]).view(-1, 1, 1)
        return hidden, rotary, starts if firsts is None else firsts + starts, blocks


class Exit(nn.Module):
    """The part after the layers: the final norm and the head.

    Args:
        model: upstream's model.
    """

    def __init__(self, model: GlmImageForConditionalGeneration) -> None:
        super().__init__()
        self.norm = model.model.language_model.norm
        self.lm_head = model.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies both to hidden states of shape (lines, 1, width).

        Returns:
            The logits: shape (lines, vocabulary), float32.
        """
        logits: torch.Tensor = self.lm_head(self.norm(hidden[:, 0]))
        return logits.float()


class GPULanguageModel(LanguageModel):
    """The `LanguageModel` for accelerators.

    Every decoding pass computes all rows at one shape, so that a row's arithmetic does not depend on the
    others in use. All passes read and write static buffers. The constructor compiles and captures the passes,
    so that no request waits for the compiler.

    Attributes:
        run_slice: runs the pass that reads a slice of a prompt.
        run_decoding: runs the pass that draws a token in each row.
        where: for each row, the index at which its last token is written, that token's position in time, row
            and column, and whether the next token belongs to the target grid: shape (5, rows).
    """

    def __init__(
        self, model: GlmImageForConditionalGeneration, *, rows: int, max_sequence_length: int
    ) -> None:
        fuse_projections(model)
        blocks = -(-max_sequence_length // BLOCK)
        super().__init__(model, rows=rows, max_sequence_length=blocks * BLOCK)

        self._entry, self._exit = Entry(self._layers), Exit(model)
        self._candidate_sampler = CandidateSampler.like(self._sampler)
        options = compilation.options(self._device)
        for part in (self._entry, *self._layers.layers, self._exit, self._candidate_sampler):
            if part is not None:
                part.compile(fullgraph=True, dynamic=False, options=options)

        def buffer(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        # On a CPU, the compiled attention of torch 2.11 requires that the first entries are contiguous.
        self.where = buffer(5, rows)
        self._noise = buffer(rows, len(self._sampler.special), dtype=torch.float32).fill_(1)
        self._blocks = torch.arange(blocks, dtype=torch.int32, device=self._device).repeat(rows, 1, 1, 1)
        # `_slice` holds tokens and their positions. `_slice_at` holds the row, the start, and the index of
        # the last token.
        self._slice = buffer(4, SLICE_TOKENS)
        self._slice_at = buffer(3)
        # For each row: the blocks of the cache of all rows, the row's own first.
        all_blocks = torch.arange(rows * blocks, dtype=torch.int32, device=self._device)
        self._all_blocks = torch.stack([all_blocks.roll(-row * blocks) for row in range(rows)])

        graphs = CUDAGraphs(self._device)
        with torch.inference_mode():
            self.run_slice = graphs.capture(self._slice_pass)
            self.run_decoding = graphs.capture(self.decoding_pass)

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Implements `LanguageModel.prefill`."""
        last = len(tokens) - 1
        # The padding of the slice is overwritten before it is read.
        filled = torch.zeros(4, SLICE_TOKENS, dtype=torch.long)
        filled[0, : last + 1] = tokens
        filled[1:, : last + 1] = positions
        self._set(self._slice, filled)
        self._set(self._slice_at, torch.tensor([row, start, last]))
        return self.run_slice().clone()

    def decode(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        """Implements `LanguageModel.decode`."""
        by_row: list[Line | None] = [None] * self.rows
        for line in lines:
            by_row[line.row] = line
        # A row that draws nothing is computed too. It writes at its next token's index, or at 0 if unused.
        where = [(one.start, *one.position.tolist(), one.in_target) if one else (0,) * 5 for one in by_row]
        self._set(self.where, torch.tensor(where).T.contiguous())
        drawing = [line for line in lines if line.generator]
        if self._candidate_sampler:
            # The noise is drawn in advance for the whole vocabulary. So each generator's stream is the same
            # as with `Sampler`.
            for line in drawing:
                self._noise[line.row].exponential_(generator=line.generator)
            self.run_decoding()
        else:
            generators = [one.generator if one else None for one in by_row]
            in_target = [one.in_target if one else False for one in by_row]
            self._tokens.copy_(self._sampler.draw(self.run_decoding(), generators, in_target))
        drawn = self._tokens.clone()  # the next pass overwrites it
        return [drawn[line.row] for line in drawing]

    def recover(self) -> None:
        """Implements `LanguageModel.recover`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a lost device raises the same error every time
            torch.cuda.empty_cache()

    def decoding_pass(self) -> torch.Tensor:
        """Reads each row's last token and, if the sampler can be captured, draws the next one.

        Returns:
            The logits: shape (rows, vocabulary).
        """
        caches = [cache.transpose(1, 2) for cache in self.caches]  # a line for each row
        hidden = self._forward(
            self._tokens[:, None], self.where[1:4, :, None], caches, None, self.where[0], self._blocks
        )
        logits: torch.Tensor = self._exit(hidden)
        if self._candidate_sampler:
            self._tokens.copy_(self._candidate_sampler(logits, self._noise, self.where[4]))
        return logits

    def _slice_pass(self) -> torch.Tensor:
        """Reads a slice into its row.

        Returns:
            The logits after its last token: shape (1, vocabulary).
        """
        row, start, last = self._slice_at.split(1)
        caches = [cache.flatten(2, 3)[:, None] for cache in self.caches]  # one line, all rows in sequence
        indices = self._all_blocks.index_select(0, row)[:, None, None]
        hidden = self._forward(
            self._slice[:1], self._slice[1:, None], caches, row * self.max_sequence_length, start, indices
        )
        logits: torch.Tensor = self._exit(hidden.index_select(1, last))
        return logits

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: list[torch.Tensor],
        firsts: torch.Tensor | None,
        starts: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the layers.

        Args:
            tokens: ids of shape (lines, n).
            positions: rotary positions of shape (3, lines, n).
            caches: keys and values of each layer: shape (2, lines, heads, positions, channels).
            firsts: start of each line's row in the caches: shape (lines,). None if every row starts at 0.
            starts: start of each line's tokens in its row: shape (lines,).
            indices: indices of blocks, those of each line's row first: shape (lines, 1, 1, blocks), int32.

        Returns:
            The hidden states: shape (lines, n, width).
        """
        hidden: torch.Tensor
        hidden, rotary, starts, blocks = self._entry(tokens, positions, firsts, starts)
        for layer, (keys, values) in zip(self._layers.layers, caches, strict=True):
            slots = GPUSlots(
                keys=keys, values=values, firsts=firsts, starts=starts, blocks=blocks, indices=indices
            )
            hidden = layer(hidden, position_embeddings=rotary, **{CACHE: slots})
        return hidden

    def _set(self, buffer: torch.Tensor, values: torch.Tensor) -> None:
        """Copies values to a buffer without waiting. Torch keeps the pinned source until the copy is done."""
        if self._device.type == "cuda":
            values = values.pin_memory()
        buffer.copy_(values, non_blocking=True)
