"""Tests that the sampler for fixed shapes draws the same tokens as the reference sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from deployments.config import ModelConfig
from deployments.families.glm_image import checkpoint
from deployments.families.glm_image.sampling import UNSOUND, Sampler
from deployments.families.glm_image.sampling_gpu import MAX_CANDIDATES, CandidateSampler

LINES = 16


@dataclass
class Case:
    """Settings of a checkpoint and a distribution of logits.

    Attributes:
        logits: function that returns logits of shape (LINES, vocabulary).
        change: changes to the generation config.
        fallbacks: whether there are lines for which the warpers leave no allowed token.
    """

    logits: Callable[[int, torch.Generator], torch.Tensor]
    change: dict[str, Any] = field(default_factory=dict)
    fallbacks: bool = False


def spread(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    return 3 * torch.randn(LINES, vocabulary, generator=generator)


def tied(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Returns logits like those of a bfloat16 head. About six tie at the edge of top-k."""
    return (4 + spread(vocabulary, generator)).to(torch.bfloat16).float()


def in_steps(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Returns logits with a few dozen ties at each value, also at the edges of top-k and top-p."""
    return (2 * spread(vocabulary, generator)).round() / 2


def special(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Returns logits for which the two special tokens nearly always win."""
    logits = spread(vocabulary, generator)
    logits[:, -2:] += 30
    return logits


def unsound(vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Returns lines of NaN, lines with one value that is not finite, and sound lines."""
    logits = spread(vocabulary, generator)
    logits[0] = torch.nan
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    logits[3, 7] = -torch.inf
    logits[4] = -torch.inf
    logits[5, :60] = torch.nan
    return logits


CASES = {
    "spread": Case(spread),
    "tied": Case(tied),
    "in steps": Case(in_steps),
    "one candidate": Case(tied, {"top_k": 1}),
    "two candidates": Case(in_steps, {"top_k": 2}),
    "no top-p": Case(tied, {"top_p": 1.0}),
    "narrow top-p": Case(in_steps, {"top_p": 0.01}),
    "empty top-p": Case(in_steps, {"top_p": 0.0}),
    "no temperature": Case(tied, {"temperature": 1.0}),
    "all of the vocabulary": Case(tied, {"top_k": 300}),
    "suppressed": Case(tied, {"suppress_tokens": list(range(0, 250, 2))}),
    "special": Case(special, {"suppress_tokens": None}, fallbacks=True),
    "special, two candidates": Case(special, {"suppress_tokens": None, "top_k": 2}, fallbacks=True),
    "end": Case(special, {"suppress_tokens": None, "top_k": 1, "eos_token_id": [256, 257]}, fallbacks=True),
    "unsound": Case(unsound),
    "unsound, without warpers but top-k": Case(unsound, {"temperature": 1.0, "top_p": 1.0}),
}


@pytest.fixture(scope="module")
def model(model_config: Callable[..., ModelConfig]) -> Any:
    model, _ = checkpoint.load_prior(model_config())
    return model


def sampler(model: Any, monkeypatch: pytest.MonkeyPatch, **change: Any) -> Sampler:
    for name, value in change.items():
        monkeypatch.setattr(model.generation_config, name, value)
    return Sampler(model)


@pytest.fixture(autouse=True)
def stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes upstream's top-p choose among equal logits as on CUDA, which sorts stably."""
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_are_drawn(model: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    reference = sampler(model, monkeypatch, **case.change)
    candidates = CandidateSampler.like(reference)
    assert candidates
    vocabulary = len(reference.special)
    in_target = torch.arange(LINES) % 2 == 0
    fallbacks = generated_tokens = 0
    for seed in range(40):
        logits = case.logits(vocabulary, torch.Generator().manual_seed(seed))
        noise = torch.empty(LINES, vocabulary).exponential_(generator=torch.Generator().manual_seed(seed))
        expected = reference.draw(logits, noise, in_target)
        assert torch.equal(candidates(logits, noise, in_target), expected)
        generated_tokens += int((expected != UNSOUND).sum())
        allowed = ~torch.stack([reference.special if target else reference.end for target in in_target])
        kept = reference.warpers(None, logits.masked_fill(reference.suppressed, -torch.inf)) > -torch.inf
        fallbacks += int((~(kept & allowed).any(dim=-1) & (expected != UNSOUND)).sum())
    assert generated_tokens
    assert bool(fallbacks) == case.fallbacks


def test_noise_of_lines_that_draw_nothing_has_no_effect(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = sampler(model, monkeypatch)
    candidates = CandidateSampler.like(reference)
    assert candidates
    logits = tied(len(reference.special), torch.Generator().manual_seed(0))
    noise = torch.ones_like(logits).exponential_(generator=torch.Generator().manual_seed(1))
    in_target = torch.zeros(LINES, dtype=torch.bool)
    drawn = candidates(logits, noise, in_target)
    noise[1:] = 1
    assert candidates(logits, noise, in_target)[0] == drawn[0]


@pytest.mark.parametrize("top_k", [0, MAX_CANDIDATES])
def test_without_a_small_top_k_there_are_no_candidates(
    model: Any, monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    reference = sampler(model, monkeypatch, top_k=top_k)
    reference.special = torch.zeros(2 * MAX_CANDIDATES, dtype=torch.bool)
    assert CandidateSampler.like(reference) is None


@pytest.mark.parametrize(
    "warpers",
    [
        [TopPLogitsWarper(0.9), TopKLogitsWarper(50)],
        [TopKLogitsWarper(50), TopKLogitsWarper(20)],
        [TopKLogitsWarper(50), lambda _, scores: scores],
    ],
)
def test_without_the_known_warpers_in_order_there_are_no_candidates(
    model: Any, monkeypatch: pytest.MonkeyPatch, warpers: list[Any]
) -> None:
    reference = sampler(model, monkeypatch)
    monkeypatch.setattr(reference, "warpers", [TemperatureLogitsWarper(0.9), *warpers])
    assert CandidateSampler.like(reference) is None
