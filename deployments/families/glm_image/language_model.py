"""Upstream's language model with a key/value cache that has one row for each request."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deployments.engines.memory import free_bytes
from deployments.errors import OutOfMemoryError
from deployments.families.glm_image.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

logger = logging.getLogger("ray.serve")

SLICE_TOKENS = 128
"""Number of prompt tokens read at a time. Running requests wait for at most one slice between two tokens.

On one H200 the released model's arithmetic for one slice takes about as long as reading its weights.
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One request's part in a decoding pass.

    Attributes:
        row: its row of the cache.
        start: index in the row at which the next token is written.
        position: rotary position of that token, in time, row and column: shape (3,), on the CPU.
        generator: random generator for the token, on the model's device. None while the request's prompt is
            being read.
        in_target: whether the token to be drawn belongs to the target grid.
    """

    row: int
    start: int
    position: torch.Tensor
    generator: torch.Generator | None
    in_target: bool


class LanguageModel:
    """Runs the layers for a prompt's slice in one row, or for one token in each of several rows.

    It keeps the last token of each row on its device, so that the host need not wait for it.

    Args:
        model: upstream's model. Its language model is modified for this use.
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a row holds.

    Attributes:
        caches: keys and values of each layer: shape (2, heads, rows, positions, channels).
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a row holds.

    Raises:
        CheckpointError: the checkpoint requires a sampling method that is not supported.
        OutOfMemoryError: the cache does not fit on the model's device.
    """

    def __init__(
        self, model: GlmImageForConditionalGeneration, *, rows: int, max_sequence_length: int
    ) -> None:
        self.rows = rows
        self.max_sequence_length = max_sequence_length
        self._layers = model.model.language_model
        self._device = model.device
        self._sampler = Sampler(model)
        config = self._layers.config
        channels = config.hidden_size // config.num_attention_heads
        # With rows next to positions, one row is a view, and so are all rows in sequence.
        shape = (2, config.num_key_value_heads, rows, max_sequence_length, channels)
        _plan(shape, config.num_hidden_layers, model)
        # Zeros, because masked values are multiplied by zero too, and NaN times zero is NaN.
        self.caches = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_hidden_layers)
        ]
        self._tokens = torch.zeros(rows, dtype=torch.long, device=model.device)

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Reads a slice of a prompt.

        Slices begin at multiples of `SLICE_TOKENS` and have that length. Only the last may be shorter.

        Args:
            row: the request's row of the cache.
            start: the slice's first position in that row.
            tokens: ids of shape (n,), on the CPU.
            positions: rotary positions of shape (3, n), on the CPU.

        Returns:
            The logits after the slice's last token: shape (1, vocabulary), float32.
        """
        raise NotImplementedError

    def draw_first(
        self, row: int, logits: torch.Tensor, generator: torch.Generator, *, in_target: bool
    ) -> torch.Tensor:
        """Draws a row's first token from the logits after its prompt.

        Returns:
            The id or `UNSOUND`, as a tensor without dimensions.
        """
        token: torch.Tensor
        (token,) = self._sampler.draw(logits, [generator], [in_target])
        self._tokens[row] = token
        return token

    def decode(self, lines: Sequence[Line]) -> list[torch.Tensor]:
        """Reads each row's last token and draws the next one.

        Args:
            lines: the lines of all rows in use. Lines without a generator draw nothing.

        Returns:
            An id or `UNSOUND` for each line with a generator, in order, as tensors without dimensions.
        """
        raise NotImplementedError

    def recover(self) -> None:
        """Prepares the device for more work after a failure. Raises an error if the device is lost."""

    def clear(self, row: int) -> None:
        """Sets the contents of a row to zero."""
        for cache in self.caches:
            cache[:, :, row].zero_()


def _plan(shape: tuple[int, ...], layers: int, model: GlmImageForConditionalGeneration) -> None:
    """Logs the memory that the cache needs, and rejects a cache that does not fit."""
    _, _, rows, max_sequence_length, _ = shape
    device: torch.device = model.device
    needed = torch.Size(shape).numel() * layers * model.dtype.itemsize
    free = free_bytes(device)
    plan = (
        f"the key/value cache of {rows} rows of {max_sequence_length} tokens takes {needed / 1e9:.2f} GB "
        f"({needed / (rows * max_sequence_length) / 1e3:.1f} KB a token); "
        f"{free / 1e9:.2f} GB are free on {device}"
    )
    if needed > free:
        raise OutOfMemoryError(f"{plan}: reduce prior.max_batch_size or prior.max_sequence_length")
    logger.info("%s", plan)
