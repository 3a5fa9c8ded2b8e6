"""Tests of the language model for accelerators, on the CPU without its compiler, against the one for CPUs."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from deployments.config import ModelConfig, Speculation
from deployments.engines import compilation
from deployments.families.glm_image import attention_gpu, checkpoint, tiny
from deployments.families.glm_image.attention_gpu import BLOCK, FusedAttention, GPUSlots, fuse_projections
from deployments.families.glm_image.cuda_graphs import MAX_AHEAD
from deployments.families.glm_image.language_model import SLICE_TOKENS, LanguageModel
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.language_model_gpu import Entry, Exit, GPULanguageModel
from deployments.families.glm_image.sampling_gpu import CandidateSampler
from deployments.families.glm_image.sequence import Sequence
from deployments.families.glm_image.versions import CACHE

ROWS = 3
MAX_SEQUENCE_LENGTH = 400
PROMPTS = (SLICE_TOKENS + 40, SLICE_TOKENS, 5)
GRIDS = (((3, 6),), ((2, 2),), ((2, 3), (4, 6)))
"""Grids that the rows draw."""
VOCABULARY = 258
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


def sequence(row: int) -> Sequence:
    """Returns the tokens and positions of a row's request."""
    generator = torch.Generator().manual_seed(row)
    drawn = sum(rows * columns for rows, columns in GRIDS[row])
    return Sequence(
        prompt=torch.randint(0, 256, (PROMPTS[row],), generator=generator),
        positions=torch.randint(0, 300, (3, PROMPTS[row] + drawn), generator=generator),
        grids=GRIDS[row],
        pixel_values=None,
        sources=(),
    )


def prefilled(model: LanguageModel, row: int) -> torch.Tensor:
    """Reads a row's prompt. Returns the logits after each slice: shape (slices, vocabulary)."""
    tokens = sequence(row).prompt
    starts = range(0, len(tokens), SLICE_TOKENS)
    return torch.cat([model.prefill(row, at, tokens[at : at + SLICE_TOKENS]) for at in starts])


def generated(model: LanguageModel) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Reads the prompts slice by slice, like the engine, while rows with a read prompt draw tokens.

    Returns:
        The logits after each slice, and each row's tokens.
    """
    logits: list[torch.Tensor] = []
    read, drawn = [0] * ROWS, [list[int]() for _ in range(ROWS)]
    for row in range(ROWS):
        model.begin(row, sequence(row), seed=10 + row)
    for _ in range(200):
        for row in reversed(range(ROWS)):
            tokens = sequence(row).prompt
            if read[row] < len(tokens):
                logits.append(model.prefill(row, read[row], tokens[read[row] : read[row] + SLICE_TOKENS]))
                read[row] = min(read[row] + SLICE_TOKENS, len(tokens))
                break
        for row, settled in model.decode().items():
            if settled == sequence(row).drawn:
                drawn[row] = model.drawn(row).tolist()
                model.end(row)
        if all(drawn):
            return logits, drawn
    raise AssertionError("some rows have not all their tokens")


@pytest.mark.parametrize("speculation", ["off", 5])
@pytest.mark.parametrize("top_k", [50, 0])
def test_slices_and_tokens_are_those_of_the_language_model_for_cpus(
    load: Callable[[], Any], top_k: int, speculation: Speculation
) -> None:
    models = [load(), load()]
    for model in models:
        model.generation_config.top_k = top_k
    ours = GPULanguageModel(
        models[0], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH, speculation=speculation
    )
    for cache in ours.caches:
        cache.normal_()  # stands for the remains of other requests
    reference = CPULanguageModel(
        models[1], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH, speculation="off"
    )
    logits, drawn = generated(ours)
    expected_logits, expected = generated(reference)
    assert drawn == expected
    assert [len(tokens) for tokens in drawn] == [18, 4, 30]
    for one, other in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_returned_is_not_overwritten(load: Callable[[], Any]) -> None:
    model = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    static = torch.zeros(1, VOCABULARY)
    model.run_slice = lambda: static.add_(1)  # a graph's result has a fixed address
    for row in (0, 2):
        model.begin(row, sequence(row), seed=0)
    first = prefilled(model, 2)
    prefilled(model, 0)
    assert (first == 1).all()


def test_all_parts_are_compiled_whole_and_with_the_options_of_the_device(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[Any, dict[str, Any]]] = []

    def compile_method(method: Any, **options: Any) -> Any:
        if "options" in options:  # PyTorch's attention compiles itself
            compiled.append((method, options))
        return method

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    monkeypatch.setattr(torch, "compile", compile_method)
    chosen = {"deterministic": True, "of": "this device"}
    monkeypatch.setattr(compilation, "options", lambda device: {**chosen, "device": device})
    model = load()
    ours = GPULanguageModel(model, rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    entry, *layers, exit_, sampler, lines, settle = (part for part, _ in compiled)
    assert layers == list(model.model.language_model.layers)
    assert [type(part) for part in (entry, exit_, sampler)] == [Entry, Exit, CandidateSampler]
    assert [lines, settle] == [ours.row_tokens.lines, ours.row_tokens.settle]
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
    model = GPULanguageModel(upstream, rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH, speculation=3)
    seen: list[GPUSlots] = []
    upstream.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs[CACHE]), with_kwargs=True
    )
    for row in range(ROWS):
        model.begin(row, sequence(0), seed=0)
        tokens = sequence(0).prompt
        model.prefill(row, 0, tokens[:SLICE_TOKENS])
        model.prefill(row, SLICE_TOKENS, tokens[SLICE_TOKENS:])
    blocks_of_a_row = seen[0].indices.shape[-1]
    for i, slots in enumerate(seen):
        row, slice_ = divmod(i, 2)
        first = row * blocks_of_a_row
        assert int(slots.blocks) == slice_ + 1
        assert slots.indices.flatten().tolist() == list(range(first, first + blocks_of_a_row))
        assert int(slots.starts) == (first + slice_) * BLOCK

    seen.clear()
    for row in (1, 2):
        model.end(row)
    model.begin(2, replace(sequence(0), prompt=torch.zeros(BLOCK - 1, dtype=torch.long)), seed=0)
    model.prefill(2, 0, torch.zeros(BLOCK - 1, dtype=torch.long))
    seen.clear()
    model.decode()
    (slots,) = seen
    firsts = [row * blocks_of_a_row * BLOCK for row in range(ROWS)]
    # The row in the middle is free. The last one begins the next block within its window.
    starts = [firsts[0] + PROMPTS[0], firsts[1], firsts[2] + BLOCK - 1]
    assert slots.starts.tolist() == [start + i for start in starts for i in range(3)]
    assert slots.blocks.flatten().tolist() == [2, 2, 2, 1, 1, 1, 1, 2, 2]
    assert slots.firsts.tolist() == [first for first in firsts for _ in range(3)]
    own = [list(range(row * blocks_of_a_row, (row + 1) * blocks_of_a_row)) for row in range(ROWS)]
    assert slots.indices.flatten(1).tolist() == [blocks for blocks in own for _ in range(3)]
    assert slots.starts.is_contiguous()  # otherwise the attention's compiled code fails in torch 2.11


def test_a_row_that_is_used_again_knows_nothing_of_its_last_request(load: Callable[[], Any]) -> None:
    """Counts of passes under way belong to the request that drew in them."""
    model = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH, speculation=8)
    model.begin(2, sequence(2), seed=0)
    prefilled(model, 2)
    assert model.decode() == {}
    model.end(2)
    model.begin(2, sequence(2), seed=1)
    prefilled(model, 2)
    assert [model.decode() for _ in range(MAX_AHEAD)] == [{}] * MAX_AHEAD  # the first one was of seed 0
    assert model.decode()[2] > 1


def test_no_pass_is_made_for_nothing(load: Callable[[], Any]) -> None:
    model = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    model.begin(1, sequence(1), seed=0)
    prefilled(model, 1)
    assert sequence(1).drawn <= len(model.row_tokens.steps)  # a pass may settle all of them
    with mock.patch.object(model, "run_decoding", wraps=model.run_decoding) as passes:
        assert model.decode() == {}
        assert model.decode()[1] > 1
    assert passes.call_count == 1


def test_a_row_may_be_filled_to_its_end(load: Callable[[], Any]) -> None:
    """Tokens that a window draws beyond the last one are not written into the next row."""
    models = [load(), load()]
    full = replace(sequence(1), prompt=torch.arange(2 * BLOCK - sequence(1).drawn + 1) % VOCABULARY)
    full = replace(full, positions=torch.arange(2 * BLOCK + 1).expand(3, -1))
    assert full.length == 2 * BLOCK
    drawn = []
    for model, runner in zip(models, (GPULanguageModel, CPULanguageModel), strict=True):
        language_model = runner(model, rows=2, max_sequence_length=full.length)
        for row in range(2):
            language_model.begin(row, full, seed=row)
            for at in range(0, len(full.prompt), SLICE_TOKENS):
                language_model.prefill(row, at, full.prompt[at : at + SLICE_TOKENS])
        settled = {0: 1, 1: 1}
        while min(settled.values()) < full.drawn:
            settled |= language_model.decode()
        drawn.append([language_model.drawn(row).tolist() for row in range(2)])
    assert drawn[0] == drawn[1]


def test_a_wrong_draft_does_not_spoil_the_tokens_before_it() -> None:
    keys = torch.zeros(1, BLOCK, 2)
    slots = GPUSlots(
        keys=keys,
        values=torch.zeros(1, BLOCK, 2),
        firsts=torch.zeros(1, dtype=torch.long),
        starts=torch.zeros(1, dtype=torch.long),
        blocks=torch.ones(1, 1, 1, dtype=torch.int32),
        indices=torch.zeros(1, 1, 1, 1, dtype=torch.int32),
    )
    values = torch.tensor([[[[1.0, 2.0], [torch.nan, torch.inf]]]])
    slots.write(torch.zeros(1, 1, 2, 2), values)
    assert slots.values[0, 0].tolist() == [1, 2]
    assert slots.values.isfinite().all()


def test_bfloat16_differs_by_its_rounding(load: Callable[[], Any]) -> None:
    exact = GPULanguageModel(load(), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    rounded = GPULanguageModel(load().to(torch.bfloat16), rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
    for model in (rounded, exact):
        model.begin(1, sequence(1), seed=0)
    logits, expected = (prefilled(model, 1) for model in (rounded, exact))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.std()))
    while not rounded.decode():
        pass
    assert all(0 <= token < SEVERAL_HEADS.codebook for token in rounded.drawn(1).tolist())


def test_memory_of_separate_projections_is_given_back_to_the_gpu(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weakref.ref((model := load()).model.language_model.layers[-1].self_attn.q_proj.weight)
    freed_before = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed_before.append(weight() is None))
    fuse_projections(SimpleNamespace(device=torch.device("cuda"), model=model.model))
    fuse_projections(SimpleNamespace(device=torch.device("cpu"), model=load().model))
    assert freed_before == [True]
