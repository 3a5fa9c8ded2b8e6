"""Tests of the prior engine's cancellation, faults, progress, and rejection of requests."""

import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from deployments.config import ModelConfig
from deployments.engines import compilation
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError, RequestTooLong
from deployments.families.glm_image import checkpoint, prior
from deployments.families.glm_image.language_model_cpu import CPULanguageModel
from deployments.families.glm_image.prior import MIN_REPORT_INTERVAL_S, PriorEngine
from deployments.stages.calls import Call
from deployments.types import TokenGrid
from tests.unit.deployments.families.glm_image.conftest import CODEBOOK_SIZE, REQUESTS, Loaded


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
            patched.setattr(loaded.engine.model, "get_image_features", fail)
        elif when == "its prompt is read":
            patched.setattr(loaded.engine.language_model, "prefill", fail)
        else:
            language_model = loaded.engine.language_model
            prefill = language_model.prefill

            def prefill_with_nan(*args: Any) -> torch.Tensor:
                with monkeypatch.context() as poisoning:
                    logits = torch.full((1, CODEBOOK_SIZE + 2), torch.nan)
                    poisoning.setattr(language_model, "_forward", lambda *_: logits)
                    return prefill(*args)

            patched.setattr(language_model, "prefill", prefill_with_nan)
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

    monkeypatch.setattr(engine.language_model, "decode", fail)
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

    monkeypatch.setattr(engine.language_model, "prefill", fail)
    monkeypatch.setattr(engine.language_model, "recover", fail)
    future = engine.submit(REQUESTS[0], Call())
    engine.run()
    with pytest.raises(EngineFault, match="device lost"):
        future.result(timeout=0)


def test_progress_is_reported_repeatedly_and_at_the_end(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.1
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
    assert all(gap >= MIN_REPORT_INTERVAL_S - 1e-9 for gap in gaps[:-1])
    assert len(reported) > 5


@pytest.mark.slow
@pytest.mark.parametrize("end", [NotANumber, Cancelled])
def test_on_fixed_shapes_a_row_is_clean_after_values_that_are_no_numbers(
    on_fixed_shapes: Loaded,
    expected: list[TokenGrid],
    monkeypatch: pytest.MonkeyPatch,
    end: type[Exception],
) -> None:
    engine, call = on_fixed_shapes.engine, Call()
    poisoned = on_fixed_shapes.submit(REQUESTS[1], call)
    with monkeypatch.context() as patched:
        begin = mock.Mock(wraps=engine.language_model.begin)
        patched.setattr(engine.language_model, "begin", begin)
        for _ in range(10):
            engine.step()
    row, *_ = begin.call_args.args
    for cache in engine.language_model.caches:
        cache[:, :, row] = torch.nan
    engine.step()
    if end is Cancelled:
        call.cancelled.set()
    while engine.step():
        pass
    with pytest.raises(end):
        poisoned.result(timeout=0)
    assert np.array_equal(on_fixed_shapes.ours(REQUESTS[0]).target, expected[0])


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
