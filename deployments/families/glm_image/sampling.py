"""Sampling of tokens from logits as in upstream's `generate`, with the noise of each line's generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Logits processors that depend only on a line's scores, so that lines can share a call."""

UNSOUND = -1
"""Placeholder for a token where the logits are not finite."""


class Sampler:
    """Samples like upstream's `generate`, but never a special token where it would spoil the image.

    The host does not wait for the device.

    Attributes:
        warpers: warpers of the checkpoint, in upstream's order.
        suppressed: tokens that the checkpoint never draws: shape (vocabulary,), bool.
        end: tokens that would end the sequence: shape (vocabulary,), bool.
        special: tokens that are not in the image codebook: shape (vocabulary,), bool.

    Raises:
        CheckpointError: the checkpoint's `generation_config` requires a processor that is not supported.
    """

    def __init__(self, model: GlmImageForConditionalGeneration) -> None:
        vocabulary = model.config.text_config.vision_vocab_size
        processors = _logits_processors(model)
        self.warpers = LogitsProcessorList([one for one in processors if isinstance(one, WARPERS)])
        suppressing = LogitsProcessorList([one for one in processors if not isinstance(one, WARPERS)])
        if unknown := [
            type(one).__name__ for one in suppressing if not isinstance(one, SuppressTokensLogitsProcessor)
        ]:
            raise CheckpointError(f"generation_config requires {', '.join(unknown)}, which is not supported")
        # The mask is computed once. Upstream's processor searches the list again for every token.
        self.suppressed = torch.isneginf(suppressing(None, torch.zeros(1, vocabulary, device=model.device)))[
            0
        ]
        ids = torch.arange(vocabulary, device=model.device)
        end = torch.tensor(model.generation_config.eos_token_id or [], device=model.device)
        self.end = torch.isin(ids, end)
        self.special = ids >= model.config.vq_config.num_embeddings

    def draw(
        self,
        logits: torch.Tensor,
        noise: torch.Tensor,
        in_target: torch.Tensor,
    ) -> torch.Tensor:
        """Draws one token for each line.

        Args:
            logits: shape (lines, vocabulary), float32.
            noise: exponentially distributed, from each line's generator: shape (lines, vocabulary), float32.
            in_target: whether a line's token belongs to the target grid: shape (lines,), bool. Special tokens
                are forbidden there. In the preview grid only end tokens are forbidden.

        Returns:
            Ids of shape (lines,). `UNSOUND` for lines whose logits are not finite.
        """
        forbidden = torch.where(in_target[:, None], self.special, self.end)
        # The mask follows the processors, so that it does not change an allowed draw. If the processors leave
        # no allowed token, the model's own preference decides.
        scores = self.warpers(None, logits.masked_fill(self.suppressed, -torch.inf))
        scores = scores.masked_fill(forbidden, -torch.inf)
        nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
        scores = torch.where(nothing, logits.masked_fill(forbidden, -torch.inf), scores)
        probabilities = scores.softmax(dim=-1)
        # This is the arithmetic of `torch.multinomial` for one sample. Its checks are left out, because they
        # wait for the device, and its noise is drawn beforehand.
        drawn = (probabilities / noise).argmax(dim=-1)
        return drawn.masked_fill(probabilities.isnan().any(dim=-1), UNSOUND)


def _logits_processors(model: GlmImageForConditionalGeneration) -> LogitsProcessorList:
    """Returns the processors of the checkpoint's `generation_config`, as transformers prepares them."""

    def prepared(_: Any, __: torch.Tensor, *, logits_processor: LogitsProcessorList, **___: Any) -> Any:
        return logits_processor

    prompt = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    return model.generate(
        prompt, attention_mask=prompt + 1, do_sample=True, max_new_tokens=1, custom_generate=prepared
    )
