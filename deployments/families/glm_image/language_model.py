"""Upstream's language model with a key/value cache that has one row for each request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from deployments.engines.memory import free_bytes
from deployments.errors import OutOfMemoryError
from deployments.families.glm_image.sampling import Sampler

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

    from deployments.families.glm_image.sequence import Sequence

logger = logging.getLogger("ray.serve")

SLICE_TOKENS = 128
"""Number of prompt tokens read at a time. Running requests wait for at most one slice between two tokens.

On one H200 the released model's arithmetic for one slice takes about as long as reading its weights.
"""


class LanguageModel:
    """Draws the tokens of several requests at once. Each request has a row of the key/value cache.

    The tokens of a row depend on its request only. They stay on the device, so that the host need not wait
    for them.

    Args:
        model: upstream's model. Its language model is modified for this use.
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a request may have.
        row_length: number of positions of a row in the cache. Defaults to `max_sequence_length`.

    Attributes:
        caches: keys and values of each layer: shape (2, heads, rows, positions, channels).
        rows: number of concurrent requests.
        max_sequence_length: number of tokens that a request may have.

    Raises:
        CheckpointError: the checkpoint requires a sampling method that is not supported.
        OutOfMemoryError: the cache does not fit on the model's device.
    """

    def __init__(
        self,
        model: GlmImageForConditionalGeneration,
        *,
        rows: int,
        max_sequence_length: int,
        row_length: int | None = None,
    ) -> None:
        self.rows = rows
        self.max_sequence_length = max_sequence_length
        self._layers = model.model.language_model
        self._device = model.device
        self._sampler = Sampler(model)
        config = self._layers.config
        channels = config.hidden_size // config.num_attention_heads
        # With rows next to positions, one row is a view, and so are all rows in sequence.
        shape = (2, config.num_key_value_heads, rows, row_length or max_sequence_length, channels)
        _plan(shape, config.num_hidden_layers, model)
        # Zeros, because masked values are multiplied by zero too, and NaN times zero is NaN.
        self.caches = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_hidden_layers)
        ]

    def begin(self, row: int, sequence: Sequence, seed: int, source: torch.Tensor | None = None) -> None:
        """Prepares a free row for a request.

        Args:
            row: the row.
            sequence: the request's tokens and positions.
            seed: its seed.
            source: tokens of its first source image, on the CPU: shape of `sequence.sources[0]`.
        """
        raise NotImplementedError

    def prefill(self, row: int, start: int, tokens: torch.Tensor) -> torch.Tensor:
        """Reads a slice of a row's prompt. After the last slice, draws the row's first token.

        Slices begin at multiples of `SLICE_TOKENS` and have that length. Only the last may be shorter.

        Args:
            row: the request's row.
            start: the slice's first position in the prompt.
            tokens: ids of shape (n,), on the CPU.

        Returns:
            The logits after the slice's last token: shape (1, vocabulary), float32.
        """
        raise NotImplementedError

    def decode(self) -> dict[int, int]:
        """Goes on drawing in every row that has its first token. There must be such a row.

        Returns:
            For each row of a pass that has ended, the number of the row's settled tokens. Empty while all
            passes are under way.
        """
        raise NotImplementedError

    def drawn(self, row: int) -> torch.Tensor:
        """Returns the settled tokens of a row: ids or `UNSOUND`, shape (n,), on the CPU."""
        raise NotImplementedError

    def end(self, row: int) -> None:
        """Frees a row, even one that was not prepared."""
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
