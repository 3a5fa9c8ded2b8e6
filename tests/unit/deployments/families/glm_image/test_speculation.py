"""Speculation changes no token: several tokens of a request in one pass are those of drawing one by one."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import MAX_WINDOW, ModelConfig, Speculation
from deployments.errors import Cancelled, OutOfMemoryError
from deployments.families.glm_image.language_model_cpu import CPULanguageModel, PackedLinear
from deployments.families.glm_image.prior import PriorEngine
from deployments.families.glm_image.sampling import UNSOUND
from deployments.families.glm_image.sequence import Sequence as SequenceOfTokens
from deployments.families.glm_image.speculation import Line, RequestTokens, Windows
from deployments.families.glm_image.speculation_gpu import RowTokens
from deployments.stages.calls import Call
from deployments.types import PriorTokens, TokenGrid
from tests.unit.deployments.families.glm_image.conftest import REQUESTS, Loaded

VOCABULARY = 8
Schedule = list[tuple[int, int, int | None]]


class RandomWindows(Windows):
    """Windows of random sizes, other ones for each request and pass."""

    def __init__(self, seed: int) -> None:
        super().__init__({})
        self._random = random.Random(seed)

    def choose(self, drawings: Sequence[RequestTokens]) -> list[int]:
        return [self._random.randint(1, MAX_WINDOW) for _ in drawings]


ARRIVAL = st.tuples(
    st.integers(0, len(REQUESTS) - 1),  # index of the request
    st.integers(0, 80),  # steps until it arrives
    st.one_of(st.none(), st.integers(0, 150)),  # steps until it is cancelled, if it is
)
SCHEDULE = st.lists(ARRIVAL, min_size=2, max_size=8)
"""Requests, when they arrive, and when they are cancelled."""
FAILING = st.sets(st.integers(0, 10), max_size=2)
"""Numbers of slices of prompts whose reading fails."""


def assert_tokens_are_expected(
    loaded: Loaded, expected: list[TokenGrid], schedule: Schedule, failing: set[int]
) -> None:
    language_model = loaded.engine.language_model
    running: list[tuple[int, Future[PriorTokens]]] = []
    cancellations: list[tuple[int, Call]] = []
    step, slices, prefill = 0, count(), language_model.prefill

    def read(*arguments: Any) -> torch.Tensor:
        if next(slices) in failing:
            raise torch.OutOfMemoryError("by chance")
        return prefill(*arguments)

    def advance() -> bool:
        nonlocal step
        for at, call in cancellations:
            if at == step:
                call.cancelled.set()
        step += 1
        return loaded.engine.step()

    with mock.patch.object(language_model, "prefill", read):
        for which, pause, cancelled_after in schedule:
            for _ in range(pause):
                advance()
            call = Call()
            if cancelled_after is not None:
                cancellations.append((step + cancelled_after, call))
            running.append((which, loaded.submit(REQUESTS[which], call)))
        while advance():
            pass
    failed = [future for _, future in running if isinstance(future.exception(timeout=0), OutOfMemoryError)]
    assert len(failed) <= len(failing)
    for (which, future), (_, _, cancelled_after) in zip(running, schedule, strict=True):
        if cancelled_after is not None and isinstance(future.exception(timeout=0), Cancelled):
            continue
        if future not in failed:
            assert np.array_equal(future.result(timeout=0).target, expected[which])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), schedule=SCHEDULE, failing=FAILING)
def test_in_any_windows_and_company_the_tokens_are_upstreams(
    loaded: Loaded, expected: list[TokenGrid], seed: int, schedule: Schedule, failing: set[int]
) -> None:
    language_model = loaded.engine.language_model
    assert isinstance(language_model, CPULanguageModel)
    chosen, language_model.windows = language_model.windows, RandomWindows(seed)
    try:
        assert_tokens_are_expected(loaded, expected, schedule, failing)
    finally:
        language_model.windows = chosen


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(schedule=st.lists(ARRIVAL, min_size=4, max_size=4), failing=FAILING)
def test_on_fixed_shapes_in_any_company_the_tokens_are_upstreams(
    on_fixed_shapes: Loaded, expected: list[TokenGrid], schedule: Schedule, failing: set[int]
) -> None:
    assert_tokens_are_expected(on_fixed_shapes, expected, schedule, failing)


@pytest.mark.parametrize("features", [64, 1024, 1025, 1536, 4096])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_row_is_the_same_in_any_company(features: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear = torch.nn.Linear(features, 96)
        packed = PackedLinear(linear)
        inputs = torch.randn(8 * MAX_WINDOW, 1, features)
        with torch.inference_mode():
            together = packed(inputs)
            torch.testing.assert_close(together, linear(inputs), rtol=1e-5, atol=1e-5)
            for count in (*range(1, MAX_WINDOW + 1), 33, 64):
                assert torch.equal(packed(inputs[:count]), together[:count])
            assert torch.equal(packed(inputs[-1:]), together[-1:])
    finally:
        torch.set_num_threads(before)


def test_fewer_passes_than_tokens_are_made(loaded: Loaded, expected: list[TokenGrid]) -> None:
    language_model, before = loaded.engine.language_model, dict(loaded.engine.work)
    assert isinstance(language_model, CPULanguageModel)
    with mock.patch.object(language_model, "windows", Windows({MAX_WINDOW: 1}, fixed=MAX_WINDOW)):
        made = loaded.ours(REQUESTS[0])
    assert np.array_equal(made.target, expected[0])
    assert 0 < made.passes < made.generated_tokens / 2
    done = {unit: amount - before[unit] for unit, amount in loaded.engine.work.items()}
    assert done == {"tokens": made.generated_tokens, "passes": made.passes}


def test_nothing_is_speculated_where_sums_depend_on_the_company(
    config: ModelConfig,
    expected: list[TokenGrid],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward = PackedLinear.forward

    def dependent(self: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        return forward(self, inputs) + (1e-6 if len(inputs) > 3 else 0)

    monkeypatch.setattr(PackedLinear, "forward", dependent)
    loaded = Loaded(config)
    assert "no speculation" in caplog.text
    made = loaded.ours(REQUESTS[0])
    assert made.passes == made.generated_tokens - 1
    assert np.array_equal(made.target, expected[0])


@pytest.mark.parametrize(("speculation", "most"), [("off", 1), (3, 3)])
def test_the_configuration_sets_the_number_of_tokens(
    config: ModelConfig, expected: list[TokenGrid], speculation: Speculation, most: int
) -> None:
    prior = config.prior.model_copy(update={"speculation": speculation})
    engine = PriorEngine.load(config.model_copy(update={"prior": prior}))
    future = engine.submit(REQUESTS[0], Call())
    engine.wait()
    while engine.step():
        pass
    made = future.result(timeout=0)
    assert np.array_equal(made.target, expected[0])
    tokens_a_pass = (made.generated_tokens - 1) / made.passes
    assert tokens_a_pass == 1 if most == 1 else 1 < tokens_a_pass <= most


def test_a_number_of_tokens_that_cannot_be_had_is_reported(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    prior = config.prior.model_copy(update={"speculation": 3})
    model = PriorEngine.load(config.model_copy(update={"prior": prior})).language_model
    assert "no speculation" in caplog.text
    assert isinstance(model, CPULanguageModel)
    assert model.windows.choose([drawing()]) == [1]


def test_values_after_a_wrong_draft_may_be_no_numbers(
    loaded: Loaded, expected: list[TokenGrid], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, settle = RequestTokens.lines, RequestTokens.settle
    drafts: list[int] = []
    spoiled = 0

    def noted(one: RequestTokens, window: int) -> list[Line]:
        found = lines(one, window)
        drafts[:] = tokens(found)[1:]
        return found

    def settle_spoiled(one: RequestTokens, drawn: list[int]) -> None:
        nonlocal spoiled
        are_right = [token == draft for token, draft in zip(drawn, drafts, strict=False)]
        right = 1 + (are_right.index(False) if False in are_right else len(drawn) - 1)
        spoiled += len(drawn) - right
        settle(one, drawn[:right] + (len(drawn) - right) * [UNSOUND])

    monkeypatch.setattr(RequestTokens, "lines", noted)
    monkeypatch.setattr(RequestTokens, "settle", settle_spoiled)
    monkeypatch.setattr(loaded.engine.language_model, "windows", Windows({4: 1}, fixed=4))
    assert np.array_equal(loaded.ours(REQUESTS[0]).target, expected[0])
    assert spoiled > 100


def sequence(*grids: tuple[int, int]) -> SequenceOfTokens:
    drawn = sum(rows * columns for rows, columns in grids)
    return SequenceOfTokens(
        prompt=torch.zeros(5, dtype=torch.long),
        positions=torch.arange(5 + drawn).expand(3, -1),
        grids=grids,
        pixel_values=None,
        sources=(),
    )


def drawing(source: torch.Tensor | None = None) -> RequestTokens:
    grids = ((2, 2), (4, 4)) if source is None else ((4, 4),)
    return RequestTokens(sequence(*grids), 1, 0, VOCABULARY, source)


def begun() -> RequestTokens:
    """Returns a drawing whose first token is settled: 1."""
    one = drawing()
    one.noise()
    one.settle([1])
    return one


def tokens(lines: Sequence[Line]) -> list[int]:
    return [line.token for line in lines]


def test_the_tokens_up_to_the_first_wrong_draft_are_settled() -> None:
    one = begun()
    lines = one.lines(4)
    assert tokens(lines) == [1, 1, 1, 1]
    assert [line.start for line in lines] == [5, 6, 7, 8]
    assert [int(line.position[0]) for line in lines] == [5, 6, 7, 8]
    assert [line.in_target for line in lines] == [False, False, False, True]
    one.settle([1, 3, 4, 5])
    assert one.settled == [1, 1, 3]
    # The others are the next drafts. The last one is new: the token before it, in the first row.
    assert tokens(one.lines(4)) == [3, 4, 5, 5]


def test_the_noise_of_a_token_stays_the_same_until_it_is_settled() -> None:
    reference = torch.Generator().manual_seed(0)
    noise = [torch.empty(VOCABULARY).exponential_(generator=reference) for _ in range(9)]
    one = drawing()
    assert torch.equal(one.noise(), noise[0])
    one.settle([1])
    for drawn in ([1, 9, 9], [7, 8], [8, 8, 1], [2]):
        settled = len(one.settled)
        for line, expected in zip(one.lines(len(drawn)), noise[settled:], strict=False):
            assert torch.equal(line.noise, expected)
        one.settle(drawn)
    assert len(one.settled) > 5


def test_the_last_window_ends_with_the_grid() -> None:
    one = begun()
    for _ in range(17):
        one.lines(1)
        one.settle([1])
    assert [line.start for line in one.lines(MAX_WINDOW)] == [22, 23]


@pytest.mark.parametrize(
    ("costs", "growths", "windows"),
    [
        ({}, [0.9, 0.9], [1, 1]),
        ({1: 1, 2: 2, 4: 4, 8: 8}, [0.9], [1]),  # each token costs as much as a pass of its own
        ({1: 1, 2: 1, 4: 1, 8: 1}, [0.9], [8]),  # tokens cost nothing, and no larger pass was measured
        ({1: 1, 2: 1, 4: 1}, [0.9] * 5, [1] * 5),
        ({1: 1, 2: 1, 4: 1, 8: 1}, [0.9, 0.1], [7, 1]),  # drafts of one request are mostly wrong
        ({1: 1, 2: 1.1, 4: 1.2, 8: 8}, [0.8], [4]),
        # No pass has more lines than were measured.
        ({1: 1, 2: 1, 4: 1, 8: 1}, [0.7, 0.6, 0.5, 0.4, 0.3], [3, 2, 1, 1, 1]),
        ({1: 1, 2: 1.3}, [0.5], [1]),  # nine percent more are within the error
        ({1: 1, 2: 1.3}, [0.6], [2]),
    ],
)
def test_windows_follow_the_costs_and_the_growths(
    costs: dict[int, float], growths: list[float], windows: list[int]
) -> None:
    drawings = [drawing() for _ in growths]
    for one, growth in zip(drawings, growths, strict=True):
        one.growth = growth
    assert Windows(costs).choose(drawings) == windows


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("right", [True, False])
def test_the_growth_follows_what_passes_settle(window: int, *, right: bool) -> None:
    one = begun()
    before = one.growth
    one.lines(window)
    one.settle([1 if right else 2] * window)  # the drafts are 1
    assert (one.growth > before) is right


@pytest.mark.parametrize("source", [None, torch.tensor([[1, 2], [3, 4]])])
def test_the_rule_that_was_right_lately_gives_the_drafts(source: torch.Tensor | None) -> None:
    one = drawing(source)
    before = [1, 2, 3, 4] if source is None else []  # the preview grid
    for token in (*before, 1, 1, 2, 2, 1, 1, 2, 2):
        one.noise()
        one.settle([token])
    # These are at the same place. Those above are 1, 1, 2.
    assert tokens(one.lines(4)) == [2, 3, 3, 4]


@pytest.mark.parametrize("seed", range(4))
def test_on_a_device_the_drafts_are_those_of_a_cpu(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    grids = [((3, 2), (6, 4)), ((5, 7),), ((2, 2), (4, 4))][seed % 3]
    source = torch.randint(3, (3, 5), generator=random) if seed % 3 == 1 else None
    of_request = sequence(*grids)
    one, window = RequestTokens(of_request, 1, 0, VOCABULARY, source), 4
    rows = RowTokens(rows=3, window=window, length=40, vocabulary=VOCABULARY, device=torch.device("cpu"))
    # What an earlier request has left in the row.
    for buffer in (rows.tokens, rows.settled, rows.known, rows.rules, rows.positions, rows.counts):
        buffer.fill_(9)
    rows.rates.copy_(torch.tensor([0.1, 0.5, 0.9])[:, None])
    rows.begin(1, of_request, source)
    rows.states[0, 1] = 1
    one.noise()
    one.settle([2])
    rows.settle_first(1, torch.tensor(2))
    while one.left:
        lines, of_rows = one.lines(window), rows.lines()
        read = of_rows.tokens
        assert tokens(lines) == read[1, : len(lines)].tolist()
        for i, line in enumerate(lines):
            assert line.start == of_rows.starts[1, i]
            assert torch.equal(line.position, of_rows.positions[:, 1, i])
            assert line.in_target == of_rows.in_target[1, i]
        # About half of the drafts are right.
        guessed = torch.cat([read[:, 1:], read[:, :1]], dim=1)
        drawn = torch.where(
            torch.rand(read.shape, generator=random) < 0.5,
            guessed,
            torch.randint(3, read.shape, generator=random),
        )
        one.settle(drawn[1, : len(lines)].tolist())
        rows.settle(read, drawn)
        assert int(rows.settled[1]) == len(one.settled)
        assert rows.tokens[1, : len(one.settled)].tolist() == one.settled


@pytest.mark.parametrize(
    ("costs", "count", "window"), [({1: 1, 16: 9}, 1, 6), ({1: 1, 16: 9}, 4, 4), ({1: 1}, 3, 1), ({}, 2, 1)]
)
def test_a_fixed_window_is_bounded_by_what_was_measured(
    costs: dict[int, float], count: int, window: int
) -> None:
    assert Windows(costs, fixed=6).choose([drawing() for _ in range(count)]) == [window] * count


def test_a_window_ends_with_the_tokens() -> None:
    one = begun()
    while one.left > 2:
        one.lines(1)
        one.settle([1])
    assert Windows(dict.fromkeys((1, 2, 4, 8), 1)).choose([one]) == [2]


def test_a_window_that_has_shrunk_grows_again() -> None:
    windows = Windows({1: 1, 2: 1.3, 4: 1.9, 8: 3})
    one = RequestTokens(sequence((20, 20)), 1, 0, VOCABULARY)
    one.noise()
    one.settle([0])
    for token in range(1, 60):  # none is like another one near it
        (window,) = windows.choose([one])
        one.settle([100 * token + 7 * i for i in range(len(one.lines(window)))])
    assert windows.choose([one]) == [1]
    for _ in range(60):
        (window,) = windows.choose([one])
        one.settle([7] * len(one.lines(window)))
    assert windows.choose([one])[0] > 2


def test_slow_passes_are_not_measured(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded.engine.language_model
    assert isinstance(model, CPULanguageModel)
    clock = count(step=2)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert model.costs() == {1: 2, 2: 2, 4: 2}


def test_the_fastest_round_counts(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded.engine.language_model
    assert isinstance(model, CPULanguageModel)
    now, passes = 0.0, 0

    def draw(lines: list[Line]) -> None:
        nonlocal now, passes
        now += 0.5 if passes // 6 == 1 else 1  # there are six sizes
        passes += 1

    monkeypatch.setattr(model, "_draw", draw)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert model.costs() == dict.fromkeys([1, 2, 4, 8, 16, 32], 0.5)
    assert passes == 3 * 6


def test_costs_are_measured_and_leave_no_trace(loaded: Loaded) -> None:
    model = loaded.engine.language_model
    assert isinstance(model, CPULanguageModel)
    costs = model.costs()
    assert list(costs) == [1, 2, 4, 8, 16, 32]  # of three rows
    assert list(model.costs(window=2)) == [1, 2, 4]
    assert all(one > 0 for one in costs.values())
    assert all(not cache[:, :, 0].any() for cache in model.caches)
