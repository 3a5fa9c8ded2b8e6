"""The language model on a CPU: it computes only rows with a token to read, with weights packed by oneDNN."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from deployments.config import MAX_WINDOW
from deployments.families.glm_image.language_model import LanguageModel
from deployments.families.glm_image.speculation import Line, RequestTokens, Windows
from deployments.families.glm_image.versions import CACHE

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

    from deployments.config import Speculation
    from deployments.families.glm_image.sequence import Sequence

logger = logging.getLogger("ray.serve")

ATTENTION = "glm_image_rows_cpu"

MEASURED_AT = 512
"""Position of the tokens by which passes are timed. Later ones attend to more keys."""
MEASURED_ROUNDS = 3
"""Number of times that a pass of each size is timed. The fastest one counts."""
MEASURED_S = 30.0
"""Seconds that all this takes at most."""


@dataclass(frozen=True, kw_only=True)
class CPUSlots:
    """Read and write positions of one forward pass in one layer's cache.

    Upstream's attention takes it twice: as its cache, and as an argument that it passes to the attention
    function. A line is one or more tokens that the pass writes one after the other in a row of the cache.

    Attributes:
        keys: the layer's cached keys: shape (heads, all rows, positions, channels).
        values: the layer's cached values: shape (heads, all rows, positions, channels).
        rows: row of each line.
        starts: position of each line's first token in its row.
        places: rows of shape (lines, 1) and positions of shape (lines, tokens), as indices of the cache.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: list[int]
    starts: list[int]
    places: tuple[torch.Tensor, torch.Tensor]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values of shape (lines, heads, tokens, channels). Returns the layer's cache."""
        self.keys[:, *self.places] = keys.transpose(0, 1)
        self.values[:, *self.places] = values.transpose(0, 1)
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
    """Applies causal attention of each line over its own keys only, so that lines do not affect each other.

    Args:
        module: upstream's attention, unused.
        query: shape (lines, heads, tokens, channels).
        keys: the layer's cached keys: shape (key/value heads, all rows, positions, channels).
        values: the layer's cached values: shape (key/value heads, all rows, positions, channels).
        mask: None, because the slots replace it.
        scaling: factor of the dot products.
        slots: the lines of the pass.

    Returns:
        The attended values, shape (lines, tokens, heads, channels), and None for the attention weights.
    """
    heads, tokens, channels = query.shape[1:]
    if tokens == 1:
        # Heads that share keys become the queries of one head, so that nothing is copied.
        query = query.reshape(-1, len(keys), heads // len(keys), channels)
    keys_of, values_of = keys[None].unbind(2), values[None].unbind(2)
    attended = []
    for one, row, start in zip(query.split(1), slots.rows, slots.starts, strict=True):
        end = start + tokens
        key, value = keys_of[row].narrow(2, 0, end), values_of[row].narrow(2, 0, end)
        if tokens == 1:
            attended.append(scaled_dot_product_attention(one, key, value, scale=scaling))
        else:
            causal = torch.ones(tokens, end, dtype=torch.bool).tril(start)
            attended.append(
                scaled_dot_product_attention(
                    one, key, value, attn_mask=causal, scale=scaling, enable_gqa=True
                ).transpose(1, 2)
            )
    return torch.cat(attended).view(-1, tokens, heads, channels), None


AttentionInterface.register(ATTENTION, rows_attention)


PACKED_FOR_ROWS = 8
"""Number of rows for which oneDNN lays out the weights. Other numbers have the same speed."""


class PackedLinear(nn.Module):
    """A linear layer for few rows on a CPU, with weights that oneDNN has laid out in advance.

    For eight rows it is several times as fast as `nn.Linear`. A row's result does not depend on the other
    rows, to the last bit. The result of `nn.Linear` does. The operators are those that `torch.compile` uses
    for `nn.Linear` when it freezes a model for the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR_ROWS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the layer to inputs of shape (…, features)."""
        # oneDNN adds in another order for a single row of more than 1,024 features, on some CPUs for any.
        alone = inputs.numel() == inputs.shape[-1]
        rows = torch.cat([inputs, inputs]) if alone else inputs
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return outputs[:1] if alone else outputs


class CPULanguageModel(LanguageModel):
    """The `LanguageModel` for CPUs.

    Args:
        model: upstream's model.
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a request may have.
        speculation: see `deployments.config.PriorConfig`.

    Attributes:
        windows: chooses how many tokens of each request a pass reads.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        *,
        rows: int,
        max_sequence_length: int,
        speculation: Speculation = "auto",
    ) -> None:
        super().__init__(model, rows=rows, max_sequence_length=max_sequence_length)
        self._layers.config._attn_implementation = ATTENTION
        self._head = model.lm_head
        fixed = speculation if isinstance(speculation, int) else None
        costs: dict[int, float] = {}
        if model.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            _pack(self._layers)
            self._head = PackedLinear(model.lm_head)
            # Without packed weights, a token's sums depend on the other tokens in its pass.
            costs = {} if speculation == "off" else self.costs(fixed or MAX_WINDOW)
        elif fixed:
            logger.warning("this build of PyTorch has no oneDNN: no speculation")
        self.windows = Windows(costs, fixed)
        self._tokens: dict[int, RequestTokens] = {}

    def begin(self, row: int, sequence: Sequence, seed: int, source: torch.Tensor | None = None) -> None:
        """Implements `LanguageModel.begin`."""
        self._tokens[row] = RequestTokens(sequence, row, seed, len(self._sampler.special), source)

    def prefill(self, row: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
        """Implements `LanguageModel.prefill`."""
        drawing = self._tokens[row]
        end = start + len(tokens)
        positions = drawing.sequence.positions[:, start:end]
        logits = self._forward(tokens[None], positions[:, None], [row], [start])
        if end == len(drawing.sequence.prompt):
            in_target = torch.tensor([drawing.in_target()])
            drawing.settle(self._sampler.draw(logits, drawing.noise()[None], in_target).tolist())
        return logits

    def decode(self) -> dict[int, int]:
        """Implements `LanguageModel.decode`."""
        drawing = {row: one for row, one in self._tokens.items() if one.settled and one.left}
        windows = self.windows.choose(list(drawing.values()))
        lines = [one.lines(window) for one, window in zip(drawing.values(), windows, strict=True)]
        tokens = iter(self._draw([*chain.from_iterable(lines)]))
        for one, of_one in zip(drawing.values(), lines, strict=True):
            one.settle(list(islice(tokens, len(of_one))))
        return {row: len(one.settled) for row, one in drawing.items()}

    def drawn(self, row: int) -> torch.Tensor:
        """Implements `LanguageModel.drawn`."""
        return torch.tensor(self._tokens[row].settled)

    def end(self, row: int) -> None:
        """Implements `LanguageModel.end`."""
        self._tokens.pop(row, None)

    def _draw(self, lines: list[Line]) -> list[int]:
        """Reads the token of each line and draws the next one."""
        logits = self._logits(lines)
        in_target = torch.tensor([line.in_target for line in lines])
        drawn: list[int] = self._sampler.draw(
            logits, torch.stack([line.noise for line in lines]), in_target
        ).tolist()
        return drawn

    def _logits(self, lines: list[Line]) -> torch.Tensor:
        """Returns the logits after each line's token: shape (lines, vocabulary), float32."""
        return self._forward(
            torch.tensor([line.token for line in lines])[:, None].clamp(min=0),
            torch.stack([line.position for line in lines], dim=1)[:, :, None],
            [line.row for line in lines],
            [line.start for line in lines],
        )

    @torch.inference_mode()
    def costs(self, window: int = MAX_WINDOW) -> dict[int, float]:
        """Measures how long decoding passes take. All rows must be free.

        Args:
            window: largest number of lines of a request.

        Returns:
            Seconds of a pass by its number of lines. Empty if the logits of a line depend on the other lines.
        """
        most = min(self.rows * window, self.max_sequence_length)
        start = min(MEASURED_AT, self.max_sequence_length - most)
        noise = torch.ones(len(self._sampler.special))
        lines = [
            Line(
                row=0,
                start=start + i,
                position=torch.full((3,), start + i),
                token=i % len(noise),
                noise=noise,
                in_target=True,
            )
            for i in range(most)
        ]
        sizes = [2**i for i in range(most.bit_length())]
        costs = dict.fromkeys(sizes, math.inf)
        until = time.perf_counter() + MEASURED_S
        known = self._logits(lines[:1])
        try:
            # In rounds, because the decoder stage may load at the same time and disturb one of them.
            for count in MEASURED_ROUNDS * sizes:
                came = time.perf_counter()
                if costs[count] == math.inf:
                    for more in (self._logits(lines[: count + 1]), self._logits(lines[:count])):
                        shared = min(len(known), len(more))
                        if not torch.equal(more[:shared], known[:shared]):
                            logger.warning(
                                "the CPU's sums depend on the number of tokens in a pass: no speculation"
                            )
                            return {}
                        known = max(known, more, key=len)
                began = time.perf_counter()
                self._draw(lines[:count])
                costs[count] = min(costs[count], time.perf_counter() - began)
                ended = time.perf_counter()
                if ended + 2 * (ended - came) > until:  # the next size has at most twice as many lines
                    break
        finally:
            self.clear(0)
        return {count: seconds for count, seconds in costs.items() if seconds < math.inf}

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: list[int], starts: list[int]
    ) -> torch.Tensor:
        """Runs the layers.

        Args:
            tokens: ids of shape (lines, n).
            positions: rotary positions of shape (3, lines, n).
            rows: row of each line.
            starts: position of each line's first token in its row.

        Returns:
            The logits after each line's last token: shape (lines, vocabulary), float32.
        """
        hidden = self._layers.embed_tokens(tokens)
        rotary = self._layers.rotary_emb(hidden, position_ids=positions)
        places = torch.tensor(rows)[:, None], torch.tensor(starts)[:, None] + torch.arange(tokens.shape[1])
        for layer, (keys, values) in zip(self._layers.layers, self.caches, strict=True):
            slots = CPUSlots(keys=keys, values=values, rows=rows, starts=starts, places=places)
            hidden = layer(hidden, position_embeddings=rotary, slots=slots, **{CACHE: slots})
        logits: torch.Tensor = self._head(self._layers.norm(hidden)[:, -1])
        return logits.float()


def _pack(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)
