"""Tests of the prior engine's tokens: upstream's in any batch, and no special tokens in the grid."""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from deployments.config import ModelConfig
from deployments.engines.prompts import plain_text
from deployments.errors import Cancelled
from deployments.families.glm_image.attention_gpu import blocks_until
from deployments.families.glm_image.language_model_cpu import PackedLinear
from deployments.families.glm_image.sequence import Sequencer
from deployments.stages.calls import Call
from deployments.types import ImageRequest, PriorTokens, TokenGrid
from tests.unit.deployments.families.glm_image.conftest import CODEBOOK_SIZE, REQUESTS, Loaded, on_few_lines


def draws_special_tokens(model: Any) -> None:
    model.generation_config.suppress_tokens = None


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_alone_the_tokens_are_upstreams(loaded: Loaded, expected: list[TokenGrid], i: int) -> None:
    tokens = loaded.ours(REQUESTS[i])
    assert np.array_equal(tokens.target, expected[i])
    assert [grid.shape for grid in tokens.sources] == [
        (source.shape[0] // 32, source.shape[1] // 32) for source in REQUESTS[i].sources
    ]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    schedule=st.lists(
        st.tuples(
            st.integers(0, len(REQUESTS) - 1),  # index of the request
            st.integers(0, 400),  # steps until it arrives
            st.none() | st.integers(0, 700),  # steps until it is cancelled
        ),
        min_size=2,
        max_size=7,
    )
)
def test_in_any_company_the_tokens_are_the_same(
    loaded: Loaded, expected: list[TokenGrid], schedule: list[tuple[int, int, int | None]]
) -> None:
    running: list[tuple[int, Future[PriorTokens], Call, list[bool]]] = []
    for which, pause, cancel_after in schedule:
        for _ in range(pause):
            loaded.engine.step()
            for _, _, call, left in running:
                if left and left.pop():
                    call.cancelled.set()
        call = Call()
        steps = [True, *[False] * cancel_after] if cancel_after is not None else []
        running.append((which, loaded.submit(REQUESTS[which], call), call, steps))
    while loaded.engine.step():
        pass
    for which, future, call, _ in running:
        try:
            tokens = future.result(timeout=0)
        except Cancelled:
            assert call.cancelled.is_set()
        else:
            assert np.array_equal(tokens.target, expected[which])


def test_one_more_than_there_are_rows_starts_when_a_row_is_free(
    loaded: Loaded, expected: list[TokenGrid]
) -> None:
    futures = [(i, loaded.submit(REQUESTS[i])) for i in (0, 2, 1, 0)]  # the second one draws the most tokens
    loaded.engine.step()
    assert [future.running() for _, future in futures] == [True, True, True, False]
    while not futures[0][1].done():
        loaded.engine.step()
    loaded.engine.step()
    assert futures[3][1].running()
    while loaded.engine.step():
        pass
    for i, future in futures:
        assert np.array_equal(future.result(timeout=0).target, expected[i])


def test_no_seed_of_the_process_is_read_or_written(loaded: Loaded) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = loaded.ours(REQUESTS[0]).target
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(loaded.ours(REQUESTS[0]).target, first)
    assert not np.array_equal(loaded.ours(replace(REQUESTS[0], seed=99)).target, first)


@pytest.mark.slow
def test_upstreams_tokens_wherever_upstream_makes_an_image(config: ModelConfig) -> None:
    loaded = Loaded(config, draws_special_tokens)
    sound = failed = 0
    for seed in range(12):
        request = replace(REQUESTS[0], seed=seed)
        ours, theirs = loaded.ours(request).target, loaded.upstreams(request)
        assert ours.min() >= 0
        assert ours.max() < CODEBOOK_SIZE
        if theirs.max() < CODEBOOK_SIZE:
            sound += 1
            assert np.array_equal(ours, theirs)
        else:
            failed += 1
    assert sound, "no seed compares the two"
    assert failed, "no seed shows the difference"


def test_an_end_token_does_not_end_the_grid(config: ModelConfig) -> None:
    def ends(model: Any) -> None:
        draws_special_tokens(model)
        model.generation_config.eos_token_id = CODEBOOK_SIZE + 1

    loaded = Loaded(config, ends)

    def ends_early(request: ImageRequest) -> bool:
        try:
            loaded.upstreams(request)
        except RuntimeError:  # a truncated grid cannot be reshaped
            return True
        return False

    request = next(request for seed in range(20) if ends_early(request := replace(REQUESTS[0], seed=seed)))
    assert loaded.ours(request).target.shape == (16, 16)


def test_special_tokens_are_never_drawn_even_where_nothing_else_is_likely(config: ModelConfig) -> None:
    def craves_special_tokens(model: Any) -> None:
        draws_special_tokens(model)
        model.generation_config.top_k = 2
        with torch.no_grad():
            # The final norm's output has no fixed sign. So each special token wins often.
            model.lm_head.weight[CODEBOOK_SIZE] *= 1000
            model.lm_head.weight[CODEBOOK_SIZE + 1] = -model.lm_head.weight[CODEBOOK_SIZE]

    tokens = Loaded(config, craves_special_tokens).ours(REQUESTS[0]).target
    assert tokens.max() < CODEBOOK_SIZE
    assert len(np.unique(tokens)) > 1


def test_reserved_strings_reach_the_model_as_letters(loaded: Loaded) -> None:
    prompt = "x <|image|> <sop>1 1<eop> <|endoftext|> <|dit_token_257|> y"
    sequencer = Sequencer(loaded.engine.model, loaded.processor)
    sequence = sequencer.sequence(replace(REQUESTS[0], prompt=prompt))
    tokenizer = loaded.processor.tokenizer
    controls = [token for token in sequence.prompt.tolist() if token in tokenizer.added_tokens_decoder]
    shape = ["<sop>", "<eop>", "<sop>", "<eop>", tokenizer.bos_token]  # two grids and the image's start
    assert tokenizer.convert_ids_to_tokens(controls) == shape
    assert tokenizer.decode(sequence.prompt).replace("\u200b", "").startswith(prompt)


@pytest.mark.parametrize("prompt", ["", "a boat", "ÖFFNUNG 早安 🙂", "< sop > <|im", "x\u200by"])
def test_other_prompts_stay_as_they_are(loaded: Loaded, prompt: str) -> None:
    assert plain_text(loaded.processor.tokenizer, prompt) == prompt


def test_a_break_that_brings_forth_another_reserved_string_is_broken_too(config: ModelConfig) -> None:
    loaded = Loaded(config)
    loaded.processor.tokenizer.add_special_tokens({"extra_special_tokens": ["p>|q", "q|r"]})
    plain = plain_text(loaded.processor.tokenizer, "<sop>|q|r<sop>")
    assert plain.replace("\u200b", "") == "<sop>|q|r<sop>"
    assert not any(reserved in plain for reserved in ("<sop>", "p>|q", "q|r"))


@pytest.mark.parametrize("i", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3)), 4])
def test_on_fixed_shapes_the_tokens_are_upstreams_too(
    on_fixed_shapes: Loaded, expected: list[TokenGrid], i: int
) -> None:
    assert np.array_equal(on_fixed_shapes.ours(REQUESTS[i]).target, expected[i])


@pytest.mark.slow
def test_on_fixed_shapes_company_changes_nothing(on_fixed_shapes: Loaded, expected: list[TokenGrid]) -> None:
    futures = []
    cancelled = Call()
    for i in (4, 0, 3, 1):
        futures.append((i, on_fixed_shapes.submit(REQUESTS[i])))
        doomed = on_fixed_shapes.submit(REQUESTS[2], cancelled)
        for _ in range(30):
            on_fixed_shapes.engine.step()
    cancelled.cancelled.set()
    while on_fixed_shapes.engine.step():
        pass
    for i, future in futures:
        assert np.array_equal(future.result(timeout=0).target, expected[i])
    with pytest.raises(Cancelled):
        doomed.result(timeout=0)


def test_a_row_is_read_up_to_the_block_of_its_last_token() -> None:
    # Without its compiler, the attention uses only the mask and ignores the blocks to be skipped.
    assert blocks_until(torch.tensor([1, 127, 128, 129, 256, 257])).tolist() == [1, 1, 1, 2, 2, 3]


@pytest.mark.slow
def test_all_layers_share_one_graph_for_a_slice_and_one_for_a_token(
    config: ModelConfig, expected: list[TokenGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[str]] = []

    def traced(graph: Any, inputs: Any, **_: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    # The graphs are traced whole and made functional, as for the GPU. Only the code generation is omitted.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=traced))
    with torch.compiler.set_stance("default"):  # other tests of this module set another one
        loaded = Loaded(config, runner=on_few_lines)
        compiled_while_loading = len(graphs)
        futures = [(i, loaded.submit(REQUESTS[i])) for i in (0, 3)]
        while loaded.engine.step():
            pass
    for i, future in futures:
        assert np.array_equal(future.result(timeout=0).target, expected[i])
    of_layers = [graph for graph in graphs if "flex_attention" in graph]
    assert len(of_layers) == 2
    # The others are the part before the layers and the part after them, each twice, the sampler, and what
    # comes before and after a decoding pass.
    assert len(graphs) == len(of_layers) + 2 * 2 + 1 + 2
    assert len(graphs) == compiled_while_loading


def test_a_packed_row_is_the_same_in_any_company() -> None:
    linear = torch.nn.Linear(512, 1024)
    packed = PackedLinear(linear)
    inputs = torch.randn(8, 1, 512)
    with torch.inference_mode():
        together = packed(inputs)
        torch.testing.assert_close(together, linear(inputs), rtol=1e-5, atol=1e-5)
        for rows in range(1, 8):
            assert torch.equal(packed(inputs[:rows]), together[:rows])
