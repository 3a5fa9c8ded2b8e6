"""The prior engine: upstream's tokens, alone and in any company, and no special token in the grid."""

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.engines import compilation
from deployments.engines.prompts import plain_text
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError, RequestTooLong
from deployments.families.glm_image import checkpoint, prior
from deployments.families.glm_image.attention_gpu import blocks_until
from deployments.families.glm_image.language_model_cpu import CPULanguageModel, PackedLinear
from deployments.families.glm_image.language_model_gpu import GPULanguageModel
from deployments.families.glm_image.prior import PROGRESS_S, PriorEngine
from deployments.stages.calls import Call
from deployments.types import ImageRequest, Pixels, PriorTokens, TokenGrid

CODEBOOK_SIZE = 256
ROWS = 3
MAX_SEQUENCE_LENGTH = 4096


def noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


REQUESTS = [
    ImageRequest(prompt="a boat", width=512, height=512, seed=1),
    ImageRequest(prompt="a longer prompt, " * 20, width=512, height=512, seed=2),
    ImageRequest(prompt="a boat", width=768, height=512, seed=3),
    ImageRequest(prompt="edit", width=512, height=512, seed=4, sources=(noise(512, 512),)),
    ImageRequest(prompt="edit", width=544, height=512, seed=5, sources=(noise(640, 512), noise(512, 608))),
]


class Loaded:
    """One checkpoint in our engine, driven by hand, and in upstream's pipeline.

    Args:
        config: of the checkpoint.
        change: done to both models before anything runs.
        runner: our way of running the language model: the CPU's, or the GPU's, which the CPU can do too.
    """

    def __init__(
        self,
        config: ModelConfig,
        change: Callable[[Any], None] | None = None,
        runner: type[CPULanguageModel | GPULanguageModel] = CPULanguageModel,
    ) -> None:
        models = []
        for _ in range(2):
            model, self.processor = checkpoint.load_prior(config)
            if change:
                change(model)
            models.append(model)
        language_model = runner(models[0], rows=ROWS, max_sequence_length=MAX_SEQUENCE_LENGTH)
        self.engine = PriorEngine(models[0], self.processor, language_model)
        self.pipeline = GlmImagePipeline(None, self.processor, None, models[1], None, None, None)

    def submit(self, request: ImageRequest, call: Call | None = None) -> Future[PriorTokens]:
        """Submit a request and wait until it is in the queue."""
        future = self.engine.submit(request, call or Call())
        self.engine._preparing.submit(int).result()
        return future

    def ours(self, request: ImageRequest) -> PriorTokens:
        future = self.submit(request)
        while self.engine.step():
            pass
        return future.result(timeout=0)

    def upstreams(self, request: ImageRequest) -> TokenGrid:
        """Raises when upstream fails, and may hold special tokens when it does not."""
        tokens, _, _ = self.pipeline.generate_prior_tokens(
            request.prompt,
            request.height,
            request.width,
            image=[[Image.fromarray(source) for source in request.sources]] if request.sources else None,
            generator=torch.Generator().manual_seed(request.seed),
        )
        grid: TokenGrid = tokens.view(request.height // 16, request.width // 16)[::2, ::2].numpy()
        return grid


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> ModelConfig:
    stage = PriorConfig(device="cpu", dtype="float32")
    return ModelConfig(
        name="m",
        family="glm_image",
        checkpoint=str(tiny_folder),
        prior=stage,
        decoder=DecoderConfig(device="cpu", dtype="float32"),
    )


@pytest.fixture(scope="module")
def loaded(config: ModelConfig) -> Loaded:
    return Loaded(config)


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> list[TokenGrid]:
    return [loaded.upstreams(request) for request in REQUESTS]


def draws_special_tokens(model: Any) -> None:
    model.generation_config.suppress_tokens = None


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_alone_the_tokens_are_upstreams(loaded: Loaded, expected: list[TokenGrid], i: int) -> None:
    tokens = loaded.ours(REQUESTS[i])
    assert np.array_equal(tokens.target, expected[i])
    assert [grid.shape for grid in tokens.sources] == [
        (source.shape[0] // 32, source.shape[1] // 32) for source in REQUESTS[i].sources
    ]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    schedule=st.lists(
        st.tuples(
            st.integers(0, len(REQUESTS) - 1),  # which request
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
    futures = [(i, loaded.submit(REQUESTS[i])) for i in (0, 2, 1, 0)]  # the second draws the most tokens
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
        except RuntimeError:  # a grid cut short takes no shape
            return True
        return False

    request = next(request for seed in range(20) if ends_early(request := replace(REQUESTS[0], seed=seed)))
    assert loaded.ours(request).target.shape == (16, 16)


def test_special_tokens_are_never_drawn_even_where_nothing_else_is_likely(config: ModelConfig) -> None:
    def craves_special_tokens(model: Any) -> None:
        draws_special_tokens(model)
        model.generation_config.top_k = 2
        with torch.no_grad():
            # The final norm's output has no fixed sign, so that each special token wins often.
            model.lm_head.weight[CODEBOOK_SIZE] *= 1000
            model.lm_head.weight[CODEBOOK_SIZE + 1] = -model.lm_head.weight[CODEBOOK_SIZE]

    tokens = Loaded(config, craves_special_tokens).ours(REQUESTS[0]).target
    assert tokens.max() < CODEBOOK_SIZE
    assert len(np.unique(tokens)) > 1


def test_reserved_strings_reach_the_model_as_letters(loaded: Loaded) -> None:
    prompt = "x <|image|> <sop>1 1<eop> <|endoftext|> <|dit_token_257|> y"
    sequence = loaded.engine._sequencer.sequence(replace(REQUESTS[0], prompt=prompt))
    tokenizer = loaded.processor.tokenizer
    controls = [token for token in sequence.prompt.tolist() if token in tokenizer.added_tokens_decoder]
    shape = ["<sop>", "<eop>", "<sop>", "<eop>", tokenizer.bos_token]  # the two grids, the image's start
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


def test_a_cancelled_request_stops_at_once(loaded: Loaded) -> None:
    call = Call()
    future = loaded.submit(REQUESTS[0], call)
    for _ in range(10):
        assert loaded.engine.step()
    call.cancelled.set()
    assert not loaded.engine.step()
    with pytest.raises(Cancelled):
        future.result(timeout=0)


@pytest.mark.parametrize("when", ["its source is encoded", "its prompt is read", "its token is drawn"])
def test_a_request_that_fails_fails_alone(
    config: ModelConfig, expected: list[TokenGrid], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    loaded = Loaded(config)
    healthy = loaded.submit(REQUESTS[0])
    for _ in range(5):
        loaded.engine.step()
    poisoned = loaded.submit(REQUESTS[3])

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(when)

    with monkeypatch.context() as patched:
        if when == "its source is encoded":
            patched.setattr(loaded.engine._model, "get_image_features", fail)
        elif when == "its prompt is read":
            patched.setattr(loaded.engine._language_model, "prefill", fail)
        else:
            row = torch.full((1, CODEBOOK_SIZE + 2), torch.nan)
            patched.setattr(loaded.engine._language_model, "prefill", lambda *_: row)
        while not poisoned.done():
            loaded.engine.step()
    with pytest.raises(NotANumber if when == "its token is drawn" else OutOfMemoryError):
        poisoned.result(timeout=0)
    after = loaded.submit(REQUESTS[3])
    while loaded.engine.step():
        pass
    assert np.array_equal(healthy.result(timeout=0).target, expected[0])
    assert np.array_equal(after.result(timeout=0).target, expected[3])


def test_a_fault_of_the_device_ends_the_engine_and_says_so(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Loaded(config).engine

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._language_model, "decode", fail)
    future = engine.submit(REQUESTS[0], Call())
    engine.run()
    with pytest.raises(EngineFault, match="device lost"):
        future.result(timeout=0)
    assert isinstance(engine.fault, EngineFault)
    with pytest.raises(EngineFault):
        engine.submit(REQUESTS[0], Call())


def test_a_fault_while_a_prompt_is_read_ends_the_engine_if_the_device_is_lost(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Loaded(config).engine

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._language_model, "prefill", fail)
    monkeypatch.setattr(engine._language_model, "recover", fail)
    future = engine.submit(REQUESTS[0], Call())
    engine.run()
    with pytest.raises(EngineFault, match="device lost"):
        future.result(timeout=0)


def test_progress_is_told_now_and_then_and_at_the_end(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr(time, "monotonic", clock)
    reported: list[Any] = []
    future = loaded.submit(REQUESTS[0], Call(report=reported.append))
    while loaded.engine.step():
        pass
    assert future.done()
    assert {progress.total for progress in reported} == {512}
    assert reported[-1].done == 512
    assert all(a.done < b.done for a, b in pairwise(reported))
    gaps = [b.seconds - a.seconds for a, b in pairwise(reported)]
    assert all(gap >= PROGRESS_S - 1e-9 for gap in gaps[:-1])
    assert len(reported) > 10


@pytest.fixture
def on_fixed_shapes(config: ModelConfig) -> Iterator[Loaded]:
    """The GPU's way of running the language model, on the CPU and without its compiler."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield Loaded(config, runner=GPULanguageModel)


@pytest.mark.parametrize("i", range(len(REQUESTS)))
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


@pytest.mark.slow
@pytest.mark.parametrize("end", [NotANumber, Cancelled])
def test_on_fixed_shapes_a_row_is_clean_after_values_that_are_no_numbers(
    on_fixed_shapes: Loaded, expected: list[TokenGrid], end: type[Exception]
) -> None:
    engine, call = on_fixed_shapes.engine, Call()
    poisoned = on_fixed_shapes.submit(REQUESTS[1], call)
    for _ in range(10):
        engine.step()
    (job,) = engine._active
    for cache in engine._language_model._caches:
        cache[:, :, job.row] = torch.nan
    engine.step()
    if end is Cancelled:
        call.cancelled.set()
    while engine.step():
        pass
    with pytest.raises(end):
        poisoned.result(timeout=0)
    assert np.array_equal(on_fixed_shapes.ours(REQUESTS[0]).target, expected[0])


def test_a_row_is_read_up_to_the_block_of_its_last_token() -> None:
    # Without its compiler, the attention looks at the mask alone and not at the blocks to be skipped.
    assert blocks_until(torch.tensor([1, 127, 128, 129, 256, 257])).tolist() == [1, 1, 1, 2, 2, 3]


@pytest.mark.slow
def test_all_layers_share_one_graph_for_a_slice_and_one_for_a_token(
    config: ModelConfig, expected: list[TokenGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[str]] = []

    def traced(graph: Any, inputs: Any, **_: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    # Traced whole and made functional as for the GPU; its code generator alone is left out.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=traced))
    loaded = Loaded(config, runner=GPULanguageModel)
    compiled_while_loading = len(graphs)
    futures = [(i, loaded.submit(REQUESTS[i])) for i in (0, 3)]
    while loaded.engine.step():
        pass
    for i, future in futures:
        assert np.array_equal(future.result(timeout=0).target, expected[i])
    of_layers = [graph for graph in graphs if "flex_attention" in graph]
    assert len(of_layers) == 2
    # What stands before the layers and what stands after them, twice too, and the sampler.
    assert len(graphs) == len(of_layers) + 2 * 2 + 1
    assert len(graphs) == compiled_while_loading


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_compiler_is_prepared_before_a_gpus_language_model_is_made(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    done: list[str] = []
    weights = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(checkpoint, "load_prior", lambda *_: (weights, None))
    monkeypatch.setattr(compilation, "prepare", done.append)
    monkeypatch.setattr(prior, "on_its_device", lambda *_: done.append("compiled"))
    monkeypatch.setattr(PriorEngine, "__init__", lambda *_: None)
    stage = config.prior.model_copy(update={"device": device})
    shares: list[float] = []
    PriorEngine.load(config.model_copy(update={"compile_cache": "/the/cache", "prior": stage}), shares.append)
    assert done == (["/the/cache", "compiled"] if device == "cuda" else ["compiled"])
    assert shares[-1] == 1


def test_a_cache_that_does_not_fit_is_refused(config: ModelConfig) -> None:
    model, _ = checkpoint.load_prior(config)
    with pytest.raises(
        OutOfMemoryError, match=r"8 rows of 1000000000000 tokens takes .* reduce prior\.max_batch_size"
    ):
        CPULanguageModel(model, rows=8, max_sequence_length=10**12)


def test_a_request_longer_than_a_row_is_refused(loaded: Loaded) -> None:
    future = loaded.submit(replace(REQUESTS[0], prompt="x" * 5000))
    with pytest.raises(RequestTooLong, match="at most 4096 fit"):
        future.result(timeout=0)


def test_a_packed_row_is_the_same_in_any_company() -> None:
    linear = torch.nn.Linear(512, 1024)
    packed = PackedLinear(linear, rows=8)
    inputs = torch.randn(8, 1, 512)
    with torch.inference_mode():
        together = packed(inputs)
        torch.testing.assert_close(together, linear(inputs), rtol=1e-5, atol=1e-5)
        for rows in range(1, 8):
            assert torch.equal(packed(inputs[:rows]), together[:rows])
