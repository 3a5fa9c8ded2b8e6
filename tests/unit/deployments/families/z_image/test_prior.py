"""Tests of Z-Image's prior engine: upstream's embeddings in any company, and clean failures."""

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from deployments.engines.prompts import plain_text
from deployments.errors import EngineFault, NotANumber, OutOfMemoryError, RequestTooLong
from deployments.families.z_image import prior as prior_module
from deployments.families.z_image import tiny
from deployments.families.z_image.prior import PriorEngine
from deployments.stages.calls import Call
from deployments.types import Embedding, ImageRequest, TextEmbeddings
from tests.unit.deployments.families.z_image.conftest import ROWS, config


class LostDevice:
    """A text encoder on a device that is lost, and a function that finds this out."""

    device = torch.device("cuda")

    def __call__(self, *_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")


def request(prompt: str = "a boat", **fields: Any) -> ImageRequest:
    return ImageRequest(prompt=prompt, width=512, height=512, seed=1, **fields)


@pytest.fixture(scope="module")
def upstream() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(tiny.cached(), local_files_only=True)


@pytest.fixture
def engine() -> PriorEngine:
    return PriorEngine.load(config())


@pytest.fixture
def running(engine: PriorEngine) -> Iterator[PriorEngine]:
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    yield engine
    engine.fault = engine.fault or EngineFault("the test is over")
    with suppress(EngineFault):
        engine.submit(request(), Call())  # wakes the engine
    thread.join(10)


@pytest.fixture
def batches(engine: PriorEngine) -> list[tuple[int, ...]]:
    """Returns a list that records the shapes of the text encoder's inputs."""
    shapes: list[tuple[int, ...]] = []
    engine.text_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def upstreams(pipeline: ZImagePipeline, text: str) -> Embedding:
    with torch.inference_mode():
        return np.asarray(pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0][0])


def test_texts_in_company_are_encoded_as_upstream_encodes_each_alone(
    engine: PriorEngine, batches: list[tuple[int, ...]], upstream: ZImagePipeline
) -> None:
    prompts = ["a boat", "ein Schiff, groß", "船" * 50, ""]
    futures = [
        engine.submit(request(text, negative_prompt="blurry", guidance_scale=scale), Call())
        for text, scale in zip(prompts, (0, 0, 4, 1), strict=True)
    ]
    threading.Thread(target=engine.run, daemon=True).start()
    wait(futures, 60)
    assert batches == [(ROWS, 512), (1, 512)]  # five texts, because one occurs twice
    for text, future in zip(prompts, futures, strict=True):
        assert np.array_equal(future.result().prompt, upstreams(upstream, text))
    negative = [future.result().negative_prompt for future in futures]
    assert negative[:2] == [None, None]
    for embedding in negative[2:]:
        assert embedding is not None
        assert np.array_equal(embedding, upstreams(upstream, "blurry"))


def test_a_text_is_encoded_once_while_it_is_kept(
    running: PriorEngine, batches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str) -> TextEmbeddings:
        return running.submit(request(prompt), Call()).result(30)

    first = answer("a boat")
    assert np.array_equal(answer("a boat").prompt, first.prompt)
    assert len(batches) == 1
    assert running.work["tokens"] == first.text_tokens == len(first.prompt)
    monkeypatch.setattr(prior_module, "CACHE_BYTES", 2 * first.prompt.nbytes)
    answer("a goat")
    answer("a boat")  # is now more recently used than the goat
    answer("a coat")  # evicts the goat
    assert len(batches) == 3
    answer("a boat")
    assert len(batches) == 3
    answer("a goat")
    assert len(batches) == 4


def test_on_a_gpu_every_batch_is_of_one_shape(
    running: PriorEngine, batches: list[tuple[int, ...]], upstream: ZImagePipeline
) -> None:
    running.texts_a_pass = 2
    made = running.submit(request(), Call()).result(30)
    running.submit(request("a goat", guidance_scale=4), Call()).result(30)
    assert batches == [(2, 512)] * 2
    assert np.array_equal(made.prompt, upstreams(upstream, "a boat"))


def test_progress_is_reported(running: PriorEngine) -> None:
    reported: list[Any] = []
    made = running.submit(request(guidance_scale=4), Call(report=reported.append)).result(30)
    assert [(event.done, event.total) for event in reported] == [
        (0, made.text_tokens),
        (made.text_tokens, made.text_tokens),
    ]


def test_control_tokens_in_a_prompt_are_letters(running: PriorEngine) -> None:
    plain = running.submit(request("a boat"), Call()).result(30).text_tokens
    made = running.submit(request("a boat<|im_end|>"), Call()).result(30)
    assert made.text_tokens > plain + len("<|im_end|>")  # a token for each letter, and for each break


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_a_text_that_upstream_would_cut_is_refused_and_its_company_is_not(
    running: PriorEngine, param: str
) -> None:
    texts: list[dict[str, Any]] = [{param: "x" * 500}, {}, {}]
    futures = [running.submit(request(guidance_scale=4, **fields), Call()) for fields in texts]
    with pytest.raises(RequestTooLong) as refused:
        futures[0].result(30)
    assert (refused.value.param, refused.value.alone, refused.value.limit) == (param, True, 512)
    assert all(len(future.result(30).prompt) for future in futures[1:])


def test_what_cannot_be_read_is_that_requests_fault(
    running: PriorEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokenizer: Any, text: str) -> str:
        return plain_text(tokenizer, text) if text != "bad" else str(1 / 0)

    monkeypatch.setattr(prior_module, "plain_text", fail)
    bad, good = running.submit(request("bad"), Call()), running.submit(request(), Call())
    with pytest.raises(ZeroDivisionError):
        bad.result(30)
    assert len(good.result(30).prompt)


def test_a_text_may_fill_its_row(running: PriorEngine) -> None:
    def tokens(letters: int) -> int:
        return running.submit(request("x" * letters), Call()).result(30).text_tokens

    most = 512 - tokens(0)
    assert tokens(most) == 512
    with pytest.raises(RequestTooLong, match="513"):
        tokens(most + 1)


def test_what_is_cancelled_before_it_began_is_not_encoded(
    engine: PriorEngine, batches: list[tuple[int, ...]]
) -> None:
    cancelled = engine.submit(request("a boat"), Call())
    assert cancelled.cancel()
    kept = engine.submit(request("a goat"), Call())
    threading.Thread(target=engine.run, daemon=True).start()
    kept.result(30)
    assert batches == [(1, 512)]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(torch.OutOfMemoryError("no more"), OutOfMemoryError), (RuntimeError("broken"), RuntimeError)],
)
def test_a_failure_is_its_batchs_and_the_engine_goes_on(
    running: PriorEngine, raised: Exception, expected: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise raised

    hook = running.text_encoder.register_forward_pre_hook(fail)
    with pytest.raises(expected):
        running.submit(request(), Call()).result(30)
    hook.remove()
    assert len(running.submit(request(), Call()).result(30).prompt)
    assert running.fault is None


def test_what_is_no_number_is_not_kept(running: PriorEngine) -> None:
    def spoil(_: object, __: object, output: Any) -> None:
        output.last_hidden_state.fill_(torch.nan)

    hook = running.text_encoder.register_forward_hook(spoil)
    with pytest.raises(NotANumber):
        running.submit(request(), Call()).result(30)
    hook.remove()
    assert np.isfinite(running.submit(request(), Call()).result(30).prompt).all()


def test_after_a_fault_all_requests_fail(engine: PriorEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, *waiting = [engine.submit(request(str(i)), Call()) for i in range(ROWS + 3)][::-1]
    assert cancelled.cancel()
    monkeypatch.setattr(engine, "text_encoder", LostDevice())
    monkeypatch.setattr(torch.cuda, "synchronize", LostDevice())
    engine.run()
    for future in waiting:
        with pytest.raises(EngineFault):
            future.result(0)
    with pytest.raises(EngineFault):
        engine.submit(request(), Call())
