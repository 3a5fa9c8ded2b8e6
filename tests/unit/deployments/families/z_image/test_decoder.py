"""Tests of Z-Image's decoder: options, progress, previews, and clean cancellation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deployments.config import Acceleration, DecoderConfig
from deployments.errors import Cancelled, UnsupportedOption
from deployments.families.z_image import checkpoint
from deployments.families.z_image.decoder import Decoder
from deployments.families.z_image.pipeline import DecoderPipeline
from deployments.stages.calls import Call
from deployments.types import Event, ImageRequest, Pixels, Preview, Progress, TextEmbeddings
from tests.unit.deployments.families.z_image.conftest import config


def embeddings() -> TextEmbeddings:
    numbers = np.random.default_rng(0)
    return TextEmbeddings(
        prompt=numbers.normal(size=(20, 32)).astype(np.float32),
        negative_prompt=numbers.normal(size=(12, 32)).astype(np.float32),
    )


SOURCE: Pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
REQUEST = ImageRequest(
    prompt="a boat", width=512, height=512, seed=1, steps=8, guidance_scale=4, prior=embeddings()
)
EDIT = replace(REQUEST, sources=(SOURCE,), strength=0.5)


@pytest.fixture
def pipeline() -> DecoderPipeline:
    return checkpoint.load_decoder(config())


@pytest.fixture
def decoder(pipeline: DecoderPipeline) -> Decoder:
    return Decoder(pipeline)


def test_normalization_and_strength_matter(decoder: Decoder) -> None:
    requests = [
        REQUEST,
        replace(REQUEST, cfg_normalization=True),
        EDIT,
        replace(EDIT, cfg_normalization=True),
        replace(EDIT, strength=0.6),
    ]
    made = [decoder.decode(request, Call()) for request in requests]
    assert len({image.tobytes() for image in made}) == len(made)


@pytest.mark.parametrize(("request_", "steps"), [(REQUEST, 8), (EDIT, 4), (replace(EDIT, strength=0.01), 1)])
def test_progress_counts_the_steps_that_are_made(
    decoder: Decoder, request_: ImageRequest, steps: int
) -> None:
    reported: list[Event] = []
    decoder.decode(replace(request_, previews=3), Call(report=reported.append))
    assert [(event.done, event.total) for event in reported if isinstance(event, Progress)] == [
        (step, steps) for step in range(1, steps + 1)
    ]
    previews = [event for event in reported if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == list(range(min(3, steps - 1)))
    assert all(preview.pixels.shape == (256, 256, 3) for preview in previews)


@pytest.mark.parametrize("request_", [REQUEST, EDIT])
def test_a_preview_is_what_comes_if_the_velocity_stays(
    pipeline: DecoderPipeline, decoder: Decoder, request_: ImageRequest
) -> None:
    velocity = torch.randn(16, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    pipeline.transformer.register_forward_hook(lambda *_: ([velocity, velocity],))
    last: list[torch.Tensor] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    reported: list[Event] = []
    decoder.decode(replace(request_, previews=3), Call(report=reported.append))
    previews = [event.pixels.astype(int) for event in reported if isinstance(event, Preview)]
    latents = torch.nn.functional.interpolate(last[-1], (32, 32), mode="area")
    with torch.inference_mode():
        expected = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="np")
    assert len(previews) == 3
    for preview in previews:
        assert np.abs(preview - 255 * expected[0]).max() < 1.1


@pytest.mark.parametrize("request_", [REQUEST, EDIT])
@pytest.mark.parametrize("cancel_at", [0, 1, 3])
def test_a_cancelled_request_stops_within_a_step_and_the_next_one_is_clean(
    pipeline: DecoderPipeline, decoder: Decoder, request_: ImageRequest, cancel_at: int
) -> None:
    expected = decoder.decode(request_, Call())
    call, passes = Call(), 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == cancel_at:
            call.cancelled.set()

    if cancel_at == 0:
        call.cancelled.set()
    hook = pipeline.transformer.register_forward_hook(count)
    with pytest.raises(Cancelled):
        decoder.decode(request_, call)
    assert passes == cancel_at
    hook.remove()
    assert np.array_equal(decoder.decode(request_, Call()), expected)


def test_reading_the_source_image_can_be_cancelled(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    call = Call()
    pipeline.vae.encoder.down_blocks[0].register_forward_hook(lambda *_: call.cancelled.set())
    reached: list[object] = []
    pipeline.vae.encoder.mid_block.register_forward_hook(lambda *_: reached.append(0))
    with pytest.raises(Cancelled):
        decoder.decode(EDIT, call)
    assert not reached


def load(**options: Any) -> Decoder:
    return Decoder.load(
        config(DecoderConfig(device="cpu", dtype="float32", acceleration=Acceleration(**options)))
    )


def test_what_the_largest_image_takes_is_foreseen_and_changes_nothing(
    decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "ray.serve"):
        planned = load()
    assert "the decoder stage takes" in caplog.text
    assert np.array_equal(planned.decode(REQUEST, Call()), decoder.decode(REQUEST, Call()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"quantization": "fp8"}, {"vae_tiling": True}])
def test_options_take_effect(options: dict[str, Any]) -> None:
    wide = replace(REQUEST, width=1056, steps=2)  # wider than one of the VAE's tiles
    plain, other = load().decode(wide, Call()), load(**options).decode(wide, Call())
    assert not np.array_equal(plain, other)
    assert np.abs(plain.astype(float) - other).mean() < 20


def differing(request: ImageRequest, text_tokens: int) -> ImageRequest:
    """Returns the request with another negative text."""
    negative = np.ones((text_tokens, 32), dtype=np.float32)
    return replace(request, prior=replace(embeddings(), negative_prompt=negative))


@pytest.mark.slow
def test_after_loading_no_unit_waits_for_the_compiler(graphs: list[object]) -> None:
    decoder, plain = load(compile=True), load()
    compiled = len(graphs)
    assert compiled
    for unit in (
        REQUEST,
        replace(REQUEST, guidance_scale=0, prior=replace(embeddings(), negative_prompt=None)),
        differing(REQUEST, 40),
        differing(EDIT, 130),
        replace(REQUEST, width=640, height=768),
        EDIT,
    ):
        unit = replace(unit, steps=2)
        apart = decoder.decode(unit, Call()).astype(int) - plain.decode(unit, Call())
        assert np.abs(apart).max() <= 2
    assert len(graphs) == compiled


def test_an_unsupported_option_is_rejected_at_loading() -> None:
    with pytest.raises(UnsupportedOption, match=r"acceleration\.step_cache .* set it to 0"):
        load(step_cache=0.1)
