"""Tests of the language model for accelerators, on the CPU without its compiler, against the one for CPUs."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deployments.config import ModelConfig
from deployments.engines import compilation
from deployments.families.glm_image import attention_gpu, checkpoint, tiny
from deployments.families.glm_image.attention_gpu import BLOCK, FusedAttention, GPUSlots, fuse_projections
from deployments.families.glm_image.language_model import SLICE_TOKENS, LanguageModel, Line
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.language_model_gpu import Entry, Exit, GPULanguageModel
from deployments.families.glm_image.sampling_gpu import CandidateSampler
from deployments.families.glm_image.versions import CACHE

ROWS = 3
MAX_SEQUENCE_LENGTH = 400
PROMPTS = (SLICE_TOKENS + 40, SLICE_TOKENS, 5)
SEVERAL_HEADS = tiny.Sizes(prior_width=128, prior_heads=8)
"""Sizes with two heads of keys and values, so that their order in the cache matters."""


@pytest.fixture(autouse=True)
def without_compiler() -> Iterator[None]:
    with (
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


@pytest.fixture
def load(model_config: Callable[..., ModelConfig]) -> Callable[[], Any]:
    config = model_config(tiny.cached(SEVERAL_HEADS))
    return lambda: checkpoint.load_prior(config)[0]


def prompt(row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids and rotary positions of a row's prompt."""
    generator = torch.Generator().manual_seed(row)
    tokens = torch.randint(0, 256, (PROMPTS[row],), generator=generator)
    return tokens, torch.randint(0, 300, (3, PROMPTS[row]), generator=generator)


def generated(model: LanguageModel, steps: int = 6) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Reads the prompts slice by slice, like the engine, while rows with a read prompt draw tokens.

    Returns:
        The logits after each slice, and each row's tokens.
    """
    generators = [torch.Generator().manual_seed(10 + row) for row in range(ROWS)]
    logits: list[torch.Tensor] = []
    read, drawn = [0] * ROWS, [list[int]() for _ in range(ROWS)]
    for _ in range(steps):
        for row in reversed(range(ROWS)):
            tokens, positions = prompt(row)
            if read[row] < len(tokens):
                at = slice(read[row], read[row] + SLICE_TOKENS)
                logits.append(model.prefill(row, read[row], tokens[at], positions[:, at]))
                read[row] = min(at.stop, len(tokens))
                if read[row] == len(tokens):
                    token = model.draw_first(row, logits[-1], generators[row], in_target=row == 1)
                    drawn[row].append(int(token))
                break
        lines = [
            Line(
                row=row,
                start=read[row] + max(0, len(drawn[row]) - 1),
                position=torch.tensor([read[row] + len(drawn[row]), row, len(drawn[row])]),
                generator=generators[row] if drawn[row] else None,
                in_target=row == 1,
            )
            for row in range(ROWS)
            if read[row]
        ]
        drawing = [line.row for line in lines if line.generator]
        for row, token in zip(drawing, model.decode(lines), strict=True):
            drawn[row].append(int(token))
    return logits, drawn


@pytest.mark.parametrize("top_k", [50, 0])
def test_slices_and_tokens_are_those_of_the_language_model_for_cpus(
    load: Callable[[], Any], top_k: int
) -> None:
    models = [load(), load()]
    for model in models:
        model.generation_config.top_k = top_k
    ours = GPULanguageModel(models[0], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    for cache in ours.caches:
        cache.normal_()  # stands for the remains of other requests
    reference = CPULanguageModel(models[1], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    logits, drawn = generated(ours)
    expected_logits, expected = generated(reference)
    assert drawn == expected
    assert [len(tokens) for tokens in drawn] == [4, 6, 7]
    for one, other in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_returned_is_not_overwritten(load: Callable[[], Any]) -> None:
    model = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    static = torch.zeros(1, 258)
    model.run_slice = lambda: static.add_(1)  # a graph's result has a fixed address
    first = model.prefill(0, 0, *prompt(2))
    model.prefill(1, 0, *prompt(2))
    assert (first == 1).all()

    generator = torch.Generator().manual_seed(0)
    line = Line(row=0, start=5, position=torch.zeros(3), generator=generator, in_target=True)
    (kept,) = model.decode([line])
    token = int(kept)
    tokens = [int(model.decode([line])[0]) for _ in range(5)]
    assert set(tokens) != {token}
    assert int(kept) == token


def test_all_parts_are_compiled_whole_and_with_the_options_of_the_device(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    chosen = {"deterministic": True, "of": "this device"}
    monkeypatch.setattr(compilation, "options", lambda device: {**chosen, "device": device})
    model = load()
    GPULanguageModel(model, rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    parts = [part for part, _ in compiled]
    assert parts[1:-2] == list(model.model.language_model.layers)
    assert [type(part) for part in (parts[0], *parts[-2:])] == [Entry, Exit, CandidateSampler]
    expected = {**chosen, "device": torch.device("cpu")}
    assert all(
        options == {"fullgraph": True, "dynamic": False, "options": expected} for _, options in compiled
    )


def test_a_cleared_row_is_zero_and_no_other(load: Callable[[], Any]) -> None:
    model = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    for cache in model.caches:
        cache.fill_(1)
    model.clear(1)
    for cache in model.caches:
        by_row = cache.transpose(0, 2)
        assert [bool((contents == 0).all()) for contents in by_row] == [False, True, False]
        assert [bool((contents == 1).all()) for contents in by_row] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_one_product_gives_queries_keys_and_values(
    load: Callable[[], Any], dtype: torch.dtype, *, biased: bool
) -> None:
    attention = load().model.language_model.layers[0].self_attn.to(dtype)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    for part in parts:
        part.bias = nn.Parameter(torch.randn(part.out_features, dtype=dtype)) if biased else None
    inputs = torch.randn(2, 3, SEVERAL_HEADS.prior_width, dtype=dtype)
    fused = FusedAttention(attention).qkv_proj
    assert (fused.bias is not None) == biased
    assert fused.weight.dtype == dtype
    torch.testing.assert_close(fused(inputs), torch.cat([part(inputs) for part in parts], dim=-1))


def test_separate_projections_are_freed_layer_by_layer(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    layers = model.model.language_model.layers
    separate = [weakref.ref(layer.self_attn.q_proj.weight) for layer in layers]
    alive = []
    fuse = attention_gpu.fused

    def counted(parts: Any) -> nn.Linear:
        alive.append(sum(weight() is not None for weight in separate))
        return fuse(parts)

    monkeypatch.setattr(attention_gpu, "fused", counted)
    weights = sum(parameter.numel() for parameter in model.parameters())
    fuse_projections(model)
    assert alive == list(range(len(layers), 0, -1))
    assert all(weight() is None for weight in separate)
    assert sum(parameter.numel() for parameter in model.parameters()) == weights


def test_the_blocks_that_are_read_hold_the_row_up_to_its_last_token(load: Callable[[], Any]) -> None:
    # Without its compiler, the attention uses only the mask and ignores the blocks to be skipped.
    upstream = load()
    model = GPULanguageModel(upstream, rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    seen: list[GPUSlots] = []
    upstream.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs[CACHE]), with_kwargs=True
    )
    tokens, positions = prompt(0)
    for row in range(ROWS):
        model.prefill(row, 0, tokens[:SLICE_TOKENS], positions[:, :SLICE_TOKENS])
        model.prefill(row, SLICE_TOKENS, tokens[SLICE_TOKENS:], positions[:, SLICE_TOKENS:])
    blocks_of_a_row = model.max_sequence_length // BLOCK
    for i, slots in enumerate(seen):
        row, slice_ = divmod(i, 2)
        first = row * blocks_of_a_row
        assert int(slots.blocks) == slice_ + 1
        assert slots.indices.flatten()[: slots.blocks].tolist() == list(range(first, first + slice_ + 1))
        assert sorted(slots.indices.flatten().tolist()) == list(range(ROWS * blocks_of_a_row))
        assert int(slots.starts) == (first + slice_) * BLOCK

    seen.clear()
    starts = [BLOCK - 1, BLOCK, 0]
    model.decode(
        [
            Line(row=row, start=start, position=torch.zeros(3), generator=None, in_target=False)
            for row, start in enumerate(starts)
        ]
    )
    (slots,) = seen
    assert slots.blocks.flatten().tolist() == [1, 2, 1]
    assert slots.indices.tolist() == [[[list(range(blocks_of_a_row))]]] * ROWS
    assert slots.starts.tolist() == starts
    assert slots.starts.is_contiguous()  # otherwise the attention's compiled code fails in torch 2.11


def test_bfloat16_differs_by_its_rounding(load: Callable[[], Any]) -> None:
    exact = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    rounded = GPULanguageModel(load().to(torch.bfloat16), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    logits, expected = (model.prefill(1, 0, *prompt(1)) for model in (rounded, exact))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.std()))
    generator = torch.Generator().manual_seed(0)
    rounded.draw_first(1, logits, generator, in_target=True)
    line = Line(row=1, start=PROMPTS[1], position=torch.ones(3), generator=generator, in_target=True)
    assert 0 <= int(rounded.decode([line])[0]) < SEVERAL_HEADS.codebook


def test_memory_of_separate_projections_is_given_back_to_the_gpu(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weakref.ref((model := load()).model.language_model.layers[-1].self_attn.q_proj.weight)
    freed_before = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed_before.append(weight() is None))
    fuse_projections(SimpleNamespace(device=torch.device("cuda"), model=model.model))
    fuse_projections(SimpleNamespace(device=torch.device("cpu"), model=load().model))
    assert freed_before == [True]
