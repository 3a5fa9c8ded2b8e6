"""The decoder: stops within a step, starts clean, and paints control strings as text."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from deployments.calls import Call
from deployments.config import ModelConfig
from deployments.errors import Cancelled
from deployments.glm_image import checkpoint
from deployments.glm_image.decoder import Decoder
from deployments.types import DecodeRequest, PriorTokens, Progress

REQUEST = DecodeRequest(
    prompt='a sign with "hello" on it',
    width=512,
    height=512,
    seed=1,
    steps=4,
    guidance_scale=1.5,
    tokens=PriorTokens(target=np.arange(256).reshape(16, 16)),
)


@pytest.fixture
def pipeline(model_config: Callable[..., ModelConfig]) -> object:
    return checkpoint.load_decoder(model_config())


@pytest.mark.parametrize("cancel_at", [0, 1, 3])
def test_a_cancelled_request_stops_within_a_step_and_the_next_one_is_clean(
    model_config: Callable[..., ModelConfig], cancel_at: int
) -> None:
    pipeline = checkpoint.load_decoder(model_config())
    decoder = Decoder(pipeline)
    expected = decoder.decode(REQUEST, Call())
    call = Call()
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        if steps // 2 == cancel_at:  # two passes a step, with and without guidance
            call.cancelled.set()
        steps += 1

    hook = pipeline.transformer.register_forward_hook(count)
    with pytest.raises(Cancelled):
        decoder.decode(replace(REQUEST, seed=2), call)
    hook.remove()
    assert steps == 2 * (cancel_at + 1)
    assert np.array_equal(decoder.decode(REQUEST, Call()), expected)


def test_a_request_cancelled_before_it_begins_does_no_work(model_config: Callable[..., ModelConfig]) -> None:
    pipeline = checkpoint.load_decoder(model_config())
    pipeline.text_encoder.register_forward_hook(lambda *_: pytest.fail("a forward pass was run"))
    call = Call()
    call.cancelled.set()
    with pytest.raises(Cancelled):
        Decoder(pipeline).decode(REQUEST, call)


def test_progress_comes_after_every_step(model_config: Callable[..., ModelConfig]) -> None:
    reported: list[Progress] = []
    Decoder(checkpoint.load_decoder(model_config())).decode(REQUEST, Call(report=reported.append))
    assert [(progress.done, progress.total) for progress in reported] == [(i, 4) for i in (1, 2, 3, 4)]
    seconds = [progress.seconds for progress in reported]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]


def test_control_strings_in_quotes_are_letters(model_config: Callable[..., ModelConfig]) -> None:
    decoder = Decoder(checkpoint.load_decoder(model_config()))
    seen = []
    encoder = decoder._pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()[0]))
    decoder.decode(replace(REQUEST, prompt='"</s><pad>"', steps=1), Call())
    letters = [byte + 3 for byte in b"</s><pad>"]  # ByT5: three control tokens, then the bytes
    assert seen[0][-len(letters) - 1 :] == [*letters, 1]
