"""Upstream's language model over a key/value cache with one row a request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch

from deployments.errors import OutOfMemoryError
from deployments.memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import GlmImageForConditionalGeneration

logger = logging.getLogger("ray.serve")

SLICE_TOKENS = 128
"""Tokens of a prompt read at a time; running requests wait for no more than that between two tokens.

On one H200 so many take the released model's arithmetic about as long as reading its weights does.
"""


class Slots(Protocol):
    """Where one forward pass writes in one layer's cache, and what it may read there.

    Upstream's attention takes it twice: as its cache, and as an argument that it hands to the attention
    function.
    """

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of shape (rows, heads, tokens, channels); returns what may be read."""


class LanguageModel:
    """Runs the layers for a prompt's slice in one row, or for one token in each of several rows.

    Args:
        model: upstream's; its language model's layers are changed for this use.
        rows: how many requests there may be at once.
        row_tokens: how many tokens a row holds.
        attention: the name of the attention function, as registered with transformers.

    Attributes:
        rows: as above.
        row_tokens: likewise.
        fixed_shape: whether `decode` takes all rows, in order, those with nothing to decode too; else it
            takes those that have.

    Raises:
        OutOfMemoryError: the cache does not fit on the model's device.
    """

    fixed_shape: bool

    def __init__(
        self, model: GlmImageForConditionalGeneration, *, rows: int, row_tokens: int, attention: str
    ) -> None:
        self.rows = rows
        self.row_tokens = row_tokens
        self._layers = model.model.language_model
        self._head = model.lm_head
        self._device = model.device
        config = self._layers.config
        config._attn_implementation = attention
        channels = config.hidden_size // config.num_attention_heads
        shape = (2, rows, config.num_key_value_heads, row_tokens, channels)
        _plan(shape, config.num_hidden_layers, model)
        # Zeros, since whatever is masked is still multiplied: by zero, and not a number stays none.
        self._caches = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_hidden_layers)
        ]

    def prefill(self, row: int, start: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read a slice of a prompt: ids of shape (n,) and positions of shape (3, n), from `start` on.

        Slices begin at multiples of `SLICE_TOKENS` and have so many tokens, the last one perhaps fewer.

        Returns:
            The logits after its last token: shape (1, vocabulary), float32.
        """
        raise NotImplementedError

    def decode(
        self, rows: list[int], starts: list[int], tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Read one token in each row: ids of shape (rows,), positions of shape (3, rows).

        Returns:
            The logits after each: shape (rows, vocabulary), float32.
        """
        raise NotImplementedError

    def recover(self) -> None:
        """Make the device ready for more after a failure; raises when the device is lost."""

    def clear(self, row: int) -> None:
        """Forget what a row holds."""
        for cache in self._caches:
            cache[:, row].zero_()

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: Callable[[torch.Tensor, torch.Tensor], Slots],
    ) -> torch.Tensor:
        """Tokens of shape (rows, n), positions of shape (3, rows, n); `slots` makes a layer's."""
        hidden = self._layers.embed_tokens(tokens)
        rotary = self._layers.rotary_emb(hidden, position_ids=positions)
        for layer, (keys, values) in zip(self._layers.layers, self._caches, strict=True):
            of_layer = slots(keys, values)
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=of_layer, slots=of_layer)
        normed: torch.Tensor = self._layers.norm(hidden)
        return normed

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden)
        return logits.float()


def _plan(shape: tuple[int, ...], layers: int, model: GlmImageForConditionalGeneration) -> None:
    """Say how much memory the cache takes, and refuse what the device does not have."""
    _, rows, _, row_tokens, _ = shape
    device: torch.device = model.device
    needed = torch.Size(shape).numel() * layers * model.dtype.itemsize
    free = free_bytes(device)
    plan = (
        f"the key/value cache of {rows} rows of {row_tokens} tokens takes {needed / 1e9:.2f} GB "
        f"({needed / (rows * row_tokens) / 1e3:.1f} KB a token); {free / 1e9:.2f} GB are free on {device}"
    )
    if needed > free:
        raise OutOfMemoryError(f"{plan}: set fewer prior.rows or fewer prior.row_tokens")
    logger.info("%s", plan)
