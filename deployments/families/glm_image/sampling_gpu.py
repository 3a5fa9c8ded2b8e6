"""Sampling at fixed shapes, without host code or sorting, so that a CUDA graph can capture it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from deployments.families.glm_image.sampling import UNSOUND

if TYPE_CHECKING:
    from deployments.families.glm_image.sampling import Sampler

ROOM_FOR_TIES = 64
"""Number of candidates beyond top-k, because top-k keeps all tokens that tie with its last one.

Logits rounded to bfloat16 often tie.
"""

MAX_CANDIDATES = 1024
"""Largest number of candidates. It is limited because top-p compares each candidate with each other."""


class CandidateSampler(nn.Module):
    """Draws the same tokens as `Sampler`, from the few candidates that top-k leaves of the vocabulary.

    The caller draws the noise. The tokens differ from those of `Sampler` in two rare cases. A last bit may
    decide, or more than `ROOM_FOR_TIES` tokens may tie with the last one of top-k.

    Args:
        sampler: the reference sampler.
        top_k: the top-k warper of that sampler.
        candidates: number of candidates.
    """

    def __init__(self, sampler: Sampler, top_k: TopKLogitsWarper, candidates: int) -> None:
        super().__init__()
        self._candidates = candidates
        self._top_k = min(top_k.top_k, candidates)
        self._temperature = 1.0
        self._top_p: float | None = None
        self._min_tokens = 1
        for warper in sampler.warpers:
            if isinstance(warper, TemperatureLogitsWarper):
                self._temperature = warper.temperature
            elif isinstance(warper, TopPLogitsWarper):
                self._top_p, self._min_tokens = warper.top_p, warper.min_tokens_to_keep
        self.suppressed = nn.Buffer(sampler.suppressed, persistent=False)
        self.end = nn.Buffer(sampler.end, persistent=False)
        self.special = nn.Buffer(sampler.special, persistent=False)

    @classmethod
    def like(cls, sampler: Sampler) -> CandidateSampler | None:
        """Returns the equivalent of a sampler.

        Returns None if the sampler has no top-k, a large top-k, or an unknown warper.
        """
        kinds = [type(warper) for warper in sampler.warpers]
        # Upstream's order is fixed: top-k precedes top-p.
        known = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper]
        if TopKLogitsWarper not in kinds or kinds != [kind for kind in known if kind in kinds]:
            return None
        top_k = sampler.warpers[kinds.index(TopKLogitsWarper)]
        vocabulary = len(sampler.special)
        # The number is a power of two, as in the compiler's kernels.
        candidates = min(vocabulary, 1 << (top_k.top_k + ROOM_FOR_TIES - 1).bit_length())
        return cls(sampler, top_k, candidates) if candidates <= MAX_CANDIDATES else None

    def forward(self, logits: torch.Tensor, noise: torch.Tensor, in_target: torch.Tensor) -> torch.Tensor:
        """Draws one token for each line. Equivalent to `Sampler.draw`.

        Args:
            logits: shape (lines, vocabulary), float32.
            noise: exponentially distributed, from each line's generator: shape (lines, vocabulary), float32.
            in_target: whether a line's token belongs to the target grid: shape (lines,), bool.

        Returns:
            Ids of shape (lines,). `UNSOUND` for lines whose logits are not finite.
        """
        forbidden = torch.where(in_target[:, None], self.special, self.end)
        scores = logits.masked_fill(self.suppressed, -torch.inf) / self._temperature
        scores, ids = scores.topk(self._candidates, dim=-1)
        scores = scores.masked_fill(scores < scores[:, self._top_k - 1, None], -torch.inf)
        if self._top_p is not None:
            scores = scores.masked_fill(self._beyond_top_p(scores, ids, self._top_p), -torch.inf)
        scores = scores.masked_fill(forbidden.gather(1, ids), -torch.inf)
        probabilities = scores.softmax(dim=-1)
        at = (probabilities / noise.gather(1, ids)).argmax(dim=-1, keepdim=True)
        drawn = ids.gather(1, at)[:, 0].masked_fill(probabilities.isnan().any(dim=-1), UNSOUND)
        # If the warpers leave no allowed token, the draw is from the whole vocabulary. The logarithm of
        # probability over noise needs no sum. A value that is not finite would be the maximum.
        allowed = logits.masked_fill(forbidden, -torch.inf)
        at = (allowed - noise.log()).argmax(dim=-1, keepdim=True)
        instead = torch.where(allowed.gather(1, at).isfinite(), at, UNSOUND)[:, 0]
        return torch.where(torch.isneginf(scores).all(dim=-1), instead, drawn)

    def _beyond_top_p(self, scores: torch.Tensor, ids: torch.Tensor, top_p: float) -> torch.Tensor:
        """Returns a mask of the candidates that upstream's `TopPLogitsWarper` removes.

        Upstream sorts by score and adds up the probabilities from the lowest. Here, a comparison selects the
        candidates to add up for each one. If scores are equal, the lower id comes first, as in a stable sort.
        CUDA sorts stably; a CPU does not.

        Args:
            scores: shape (lines, candidates).
            ids: shape (lines, candidates).
            top_p: probability mass to keep.
        """
        one, other = scores[:, :, None], scores[:, None, :]
        after = (other > one) | ((other == one) & (ids[:, None, :] > ids[:, :, None]))
        mass = torch.where(after, 0.0, scores.softmax(dim=-1)[:, None, :]).sum(dim=-1)
        return (mass <= 1 - top_p) & (after.sum(dim=-1) >= self._min_tokens)
