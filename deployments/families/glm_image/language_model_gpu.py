"""The language model on an accelerator: fixed shapes, compiled parts, a CUDA graph for each kind of pass."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deployments.config import gpu_window
from deployments.engines import compilation
from deployments.families.glm_image.attention_gpu import BLOCK, GPUSlots, blocks_until, fuse_projections
from deployments.families.glm_image.cuda_graphs import MAX_AHEAD, CUDAGraphs, set_without_waiting
from deployments.families.glm_image.language_model import SLICE_TOKENS, LanguageModel
from deployments.families.glm_image.sampling_gpu import CandidateSampler
from deployments.families.glm_image.speculation_gpu import Lines, RowTokens
from deployments.families.glm_image.versions import CACHE

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

    from deployments.config import Speculation
    from deployments.families.glm_image.sequence import Sequence


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
        self, tokens: torch.Tensor, positions: torch.Tensor, firsts: torch.Tensor, starts: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Prepares a pass.

        Args:
            tokens: ids of shape (lines, n). `UNSOUND` is read as 0.
            positions: rotary positions of shape (3, lines, n).
            firsts: start of each line's row in the cache: shape (lines,).
            starts: start of each line's tokens in its row: shape (lines,).

        Returns:
            The first layer's input, and the cosines and sines. Also the start of each line's tokens in the
            cache, and the number of blocks that each line reads.
        """
        hidden = self.embed_tokens(tokens.clamp(min=0))
        rotary = self.rotary_emb(hidden, position_ids=positions)
        blocks = blocks_until(starts + tokens.shape[1]).view(-1, 1, 1)
        return hidden, rotary, firsts + starts, blocks


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


@dataclass(kw_only=True)
class _Row:
    """State of a row in use, as far as the host knows it.

    Attributes:
        sequence: tokens and positions of its request.
        generator: generator of its noise, on the model's device.
        read: number of tokens of its prompt that were read.
        settled: number of its tokens that are known to be settled.
        with_noise: number of its tokens whose noise was drawn.
    """

    sequence: Sequence
    generator: torch.Generator
    read: int = 0
    settled: int = 0
    with_noise: int = 0

    @property
    def draws(self) -> bool:
        """Whether its first token was drawn."""
        return self.settled > 0


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A pass that the host has enqueued, and whose result it does not know yet.

    Attributes:
        rows: the rows that draw.
        counts: number of settled tokens of each row after the pass, when it has ended: shape (rows,), on the
            CPU.
        ended: event after the copy of the counts. None if the device is not CUDA.
    """

    rows: dict[int, _Row]
    counts: torch.Tensor
    ended: torch.cuda.Event | None

    @classmethod
    def enqueued(cls, rows: dict[int, _Row], settled: torch.Tensor) -> _Pass:
        """Enqueues the copy of the counts after a pass."""
        if settled.device.type != "cuda":
            return cls(rows=rows, counts=settled.clone(), ended=None)
        counts = torch.empty(settled.shape, dtype=settled.dtype, pin_memory=True)
        counts.copy_(settled, non_blocking=True)
        ended = torch.cuda.Event(blocking=True)  # by default, waiting occupies a CPU core
        ended.record()
        return cls(rows=rows, counts=counts, ended=ended)

    def settled(self) -> list[int]:
        """Waits for the end of the pass. Returns the number of settled tokens of each row."""
        if self.ended:
            self.ended.synchronize()
        counts: list[int] = self.counts.tolist()
        return counts


class GPULanguageModel(LanguageModel):
    """The `LanguageModel` for accelerators.

    Every decoding pass computes the same number of tokens in all rows, so that a token's arithmetic does not
    depend on the others. All passes read and write static buffers. The constructor compiles and captures the
    passes, so that no request waits for the compiler.

    Args:
        model: upstream's model.
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a request may have.
        speculation: see `deployments.config.PriorConfig`.

    Attributes:
        run_slice: runs the pass that reads a slice of a prompt.
        run_decoding: runs the pass that draws tokens in each row.
        row_tokens: tokens of all rows.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        *,
        rows: int,
        max_sequence_length: int,
        speculation: Speculation = "auto",
    ) -> None:
        window = gpu_window(speculation, rows)
        fuse_projections(model)
        blocks = -(-(max_sequence_length + window) // BLOCK)
        self._row_length = blocks * BLOCK
        super().__init__(
            model, rows=rows, max_sequence_length=max_sequence_length, row_length=self._row_length
        )
        vocabulary = len(self._sampler.special)

        self._entry, self._exit = Entry(self._layers), Exit(model)
        self._candidate_sampler = CandidateSampler.like(self._sampler)
        self.row_tokens = RowTokens(
            rows=rows,
            window=window,
            length=max_sequence_length,
            vocabulary=vocabulary,
            device=self._device,
        )
        options = compilation.options(self._device)
        for part in (self._entry, *self._layers.layers, self._exit, self._candidate_sampler):
            if part is not None:
                part.compile(fullgraph=True, dynamic=False, options=options)
        self._lines = torch.compile(self.row_tokens.lines, fullgraph=True, dynamic=False, options=options)
        self._settle = torch.compile(self.row_tokens.settle, fullgraph=True, dynamic=False, options=options)

        # `_slice` holds tokens and their positions. `_slice_at` holds the row, the start, and the index of
        # the last token.
        self._slice = torch.zeros(4, SLICE_TOKENS, dtype=torch.long, device=self._device)
        self._slice_at = torch.zeros(3, dtype=torch.long, device=self._device)
        # For each row: its start in the cache of all rows, and its blocks there.
        self._firsts = self._row_length * torch.arange(rows, device=self._device)
        all_blocks = torch.arange(rows * blocks, dtype=torch.int32, device=self._device)
        self._blocks = all_blocks.view(rows, 1, 1, blocks)
        # The same for each line of a decoding pass.
        self._line_firsts = self._firsts.repeat_interleave(window)
        self._line_blocks = self._blocks.repeat_interleave(window, dim=0)

        self._in_use: dict[int, _Row] = {}
        self._under_way: deque[_Pass] = deque()
        # Lines of the last pass. A captured pass writes them to the same memory each time.
        self._lines_read: Lines
        graphs = CUDAGraphs(self._device)
        with torch.inference_mode():
            self.run_slice = graphs.capture(self._slice_pass)
            self.run_decoding = graphs.capture(self.decoding_pass)
            self._pass()

    def begin(self, row: int, sequence: Sequence, seed: int, source: torch.Tensor | None = None) -> None:
        """Implements `LanguageModel.begin`."""
        self._in_use[row] = _Row(sequence=sequence, generator=torch.Generator(self._device).manual_seed(seed))
        self.row_tokens.begin(row, sequence, source)

    def prefill(self, row: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
        """Implements `LanguageModel.prefill`."""
        state, last = self._in_use[row], len(tokens) - 1
        # The padding of the slice is overwritten before it is read.
        filled = torch.zeros(4, SLICE_TOKENS, dtype=torch.long)
        filled[0, : last + 1] = tokens
        filled[1:, : last + 1] = state.sequence.positions[:, start : start + last + 1]
        set_without_waiting(self._slice, filled)
        set_without_waiting(self._slice_at, torch.tensor([row, start, last]))
        logits = self.run_slice().clone()
        state.read = start + last + 1
        if state.read == len(state.sequence.prompt):
            noise = self.row_tokens.draw_noise(row, 0, state.generator)
            in_target = torch.full((1,), state.sequence.before_target == 0, device=self._device)
            self.row_tokens.settle_first(row, self._sampler.draw(logits, noise[None], in_target)[0])
            state.settled = state.with_noise = 1
        return logits

    def decode(self) -> dict[int, int]:
        """Implements `LanguageModel.decode`. At most `MAX_AHEAD` passes are under way."""
        if self._may_all_be_settled():
            return self._learn()
        learned = self._learn() if len(self._under_way) == MAX_AHEAD else {}
        self._enqueue()
        return learned

    def drawn(self, row: int) -> torch.Tensor:
        """Implements `LanguageModel.drawn`."""
        return self.row_tokens.tokens[row, : self._in_use[row].settled].to("cpu", copy=True)

    def end(self, row: int) -> None:
        """Implements `LanguageModel.end`."""
        self._in_use.pop(row, None)

    def recover(self) -> None:
        """Implements `LanguageModel.recover`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a lost device raises the same error every time
            torch.cuda.empty_cache()

    def _may_all_be_settled(self) -> bool:
        """Whether the passes under way may settle all tokens, so that a further one may be for nothing."""
        return bool(self._under_way) and all(
            state.settled + len(self._under_way) * len(self.row_tokens.steps) >= state.sequence.drawn
            for state in self._in_use.values()
            if state.draws
        )

    def _enqueue(self) -> None:
        """Enqueues a pass, and the copy of what it settles."""
        in_use = [self._in_use.get(row) for row in range(self.rows)]
        states = torch.tensor([(state.draws, state.read) if state else (0, 0) for state in in_use]).T
        drawing = {row: state for row, state in self._in_use.items() if state.draws}
        for row, state in drawing.items():
            until = min(state.settled + self.row_tokens.noise.shape[1], state.sequence.drawn)
            for index in range(state.with_noise, until):
                self.row_tokens.draw_noise(row, index, state.generator)
            state.with_noise = until
        set_without_waiting(self.row_tokens.states, states)
        self._pass()
        self._under_way.append(_Pass.enqueued(drawing, self.row_tokens.settled))

    def _pass(self) -> None:
        """Runs a decoding pass, and the checkpoint's sampler if that is not captured."""
        logits = self.run_decoding()
        if not self._candidate_sampler:
            self._draw(logits, self._lines_read)

    def _learn(self) -> dict[int, int]:
        """Waits for the oldest pass under way. Returns the number of settled tokens of each row in it."""
        oldest = self._under_way.popleft()
        counts = oldest.settled()
        learned = {row: counts[row] for row, state in oldest.rows.items() if self._in_use.get(row) is state}
        for row, settled in learned.items():
            self._in_use[row].settled = settled
        return learned

    def decoding_pass(self) -> torch.Tensor:
        """Reads the lines of all rows and, if the sampler can be captured, draws and settles tokens.

        Returns:
            The logits: shape (lines, vocabulary).
        """
        lines = self._lines_read = self._lines()
        hidden = self._forward(
            lines.tokens.view(-1, 1),
            lines.positions.view(3, -1, 1),
            self._line_firsts,
            lines.starts.view(-1),
            self._line_blocks,
        )
        logits: torch.Tensor = self._exit(hidden)
        if self._candidate_sampler:
            self._draw(logits, lines)
        return logits

    def _draw(self, logits: torch.Tensor, lines: Lines) -> None:
        """Draws a token after each line and settles those that follow right drafts."""
        sampler = self._candidate_sampler or self._sampler.draw
        drawn = sampler(logits, lines.noise.flatten(0, 1), lines.in_target.flatten())
        self._settle(lines.tokens, drawn.view_as(lines.tokens))

    def _slice_pass(self) -> torch.Tensor:
        """Reads a slice into its row.

        Returns:
            The logits after its last token: shape (1, vocabulary).
        """
        row, start, last = self._slice_at.split(1)
        hidden = self._forward(
            self._slice[:1],
            self._slice[1:, None],
            self._firsts.index_select(0, row),
            start,
            self._blocks.index_select(0, row),
        )
        logits: torch.Tensor = self._exit(hidden.index_select(1, last))
        return logits

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        firsts: torch.Tensor,
        starts: torch.Tensor,
        indices: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the layers.

        Args:
            tokens: ids of shape (lines, n).
            positions: rotary positions of shape (3, lines, n).
            firsts: start of each line's row in the cache of all rows: shape (lines,).
            starts: start of each line's tokens in its row: shape (lines,).
            indices: indices of the blocks of each line's row: shape (lines, 1, 1, blocks), int32.

        Returns:
            The hidden states: shape (lines, n, width).
        """
        hidden: torch.Tensor
        hidden, rotary, starts, blocks = self._entry(tokens, positions, firsts, starts)
        for layer, cache in zip(self._layers.layers, self.caches, strict=True):
            keys, values = cache.flatten(2, 3)  # all rows in sequence
            slots = GPUSlots(
                keys=keys, values=values, firsts=firsts, starts=starts, blocks=blocks, indices=indices
            )
            hidden = layer(hidden, position_embeddings=rotary, **{CACHE: slots})
        return hidden
