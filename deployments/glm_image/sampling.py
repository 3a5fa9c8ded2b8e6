"""Drawing tokens from logits, each line with a generator of its own."""

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
    from collections.abc import Sequence

    from transformers import GlmImageForConditionalGeneration

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""The logits processors that look at a line's scores and at nothing else, so that lines can share a call."""

UNSOUND = -1
"""Stands for a token where the logits were no numbers."""


class Sampler:
    """Draws as upstream's `generate` does, but no special token where it would spoil the image.

    Nothing in here makes the host wait for the device.
    """

    def __init__(self, model: GlmImageForConditionalGeneration) -> None:
        vocabulary = model.config.text_config.vision_vocab_size
        processors = _logits_processors(model)
        self._warpers = LogitsProcessorList([one for one in processors if isinstance(one, WARPERS)])
        suppressing = LogitsProcessorList([one for one in processors if not isinstance(one, WARPERS)])
        if unknown := [
            type(one).__name__ for one in suppressing if not isinstance(one, SuppressTokensLogitsProcessor)
        ]:
            raise CheckpointError(f"generation_config asks for {', '.join(unknown)}, which is not supported")
        # Looked up once: upstream's processor searches the list anew for every token.
        self._suppressed = torch.isneginf(suppressing(None, torch.zeros(1, vocabulary, device=model.device)))
        ids = torch.arange(vocabulary, device=model.device)
        end = torch.tensor(model.generation_config.eos_token_id or [], device=model.device)
        self._end = torch.isin(ids, end)
        self._special = ids >= model.config.vq_config.num_embeddings

    def draw(
        self,
        logits: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        in_target: Sequence[bool],
    ) -> torch.Tensor:
        """Draw a token a line.

        Args:
            logits: shape (lines, vocabulary), float32.
            generators: a line's own; None for a line whose token nobody needs.
            in_target: whether a line's token belongs to the target grid, where no special token may be; in
                the preview grid only end tokens may not.

        Returns:
            Ids of shape (lines,), `UNSOUND` where the line's logits hold something that is no number.
        """
        forbidden = torch.stack([self._special if target else self._end for target in in_target])
        # After the processors and not before them: a draw that is allowed is the same with the mask and
        # without. Where they leave nothing that is, the model's own preference decides.
        scores = self._warpers(None, logits.masked_fill(self._suppressed, -torch.inf))
        scores = scores.masked_fill(forbidden, -torch.inf)
        nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
        scores = torch.where(nothing, logits.masked_fill(forbidden, -torch.inf), scores)
        probabilities = scores.softmax(dim=-1)
        # What `torch.multinomial` does for one sample, without its checks, for which the host would wait.
        noise = torch.ones_like(probabilities)
        for line, generator in zip(noise.split(1), generators, strict=True):
            if generator is not None:
                line.exponential_(generator=generator)
        drawn = (probabilities / noise).argmax(dim=-1)
        return drawn.masked_fill(probabilities.isnan().any(dim=-1), UNSOUND)


def _logits_processors(model: GlmImageForConditionalGeneration) -> LogitsProcessorList:
    """What the checkpoint's `generation_config` asks for, as transformers' own `generate` prepares it."""

    def prepared(_: Any, __: torch.Tensor, *, logits_processor: LogitsProcessorList, **___: Any) -> Any:
        return logits_processor

    prompt = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    return model.generate(
        prompt, attention_mask=prompt + 1, do_sample=True, max_new_tokens=1, custom_generate=prepared
    )
