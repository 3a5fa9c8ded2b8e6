"""Tests of the decoder: upstream's pixels, progress, previews, and clean failures."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline

from deployments.config import ModelConfig
from deployments.engines import diffusion
from deployments.engines.memory import wait_for
from deployments.errors import Cancelled, EngineFault, NotANumber, OutOfMemoryError
from deployments.families.glm_image import checkpoint
from deployments.families.glm_image import pipeline as pipeline_module
from deployments.families.glm_image.decoder import Decoder
from deployments.families.glm_image.pipeline import DecoderPipeline
from deployments.stages.calls import Call
from deployments.types import Event, ImageRequest, Pixels, Preview, PriorTokens, Progress
from tests.unit.deployments.families.glm_image.conftest import noise


def tokens(rows: int, columns: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns))


REQUEST = ImageRequest(
    prompt='a sign with "hello" on it',
    width=512,
    height=512,
    seed=1,
    steps=4,
    guidance_scale=1.5,
    prior=PriorTokens(target=tokens(16, 16)),
)
EDIT = replace(
    REQUEST,
    width=544,
    sources=(noise(512, 544), noise(640, 512)),
    prior=PriorTokens(target=tokens(16, 17), sources=(tokens(17, 16), tokens(16, 20))),
)


@pytest.fixture
def pipeline(model_config: Callable[..., ModelConfig]) -> DecoderPipeline:
    return checkpoint.load_decoder(model_config())


@pytest.fixture
def decoder(pipeline: DecoderPipeline) -> Decoder:
    return Decoder(pipeline)


def upstreams(folder: Path, conditions: dict[str, Any], request: ImageRequest) -> Pixels:
    """Returns the pixels of diffusers' own pipeline under the same conditions."""
    pipeline = GlmImagePipeline.from_pretrained(folder, processor=None, vision_language_encoder=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **conditions,
    ).images
    return np.asarray(images[0])


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, guidance_scale=1.0), EDIT])
def test_the_pixels_are_upstreams(decoder: Decoder, tiny_folder: Path, request_: ImageRequest) -> None:
    expected = upstreams(tiny_folder, decoder.conditions(request_), request_)
    for _ in range(2):  # the second run uses the caches
        assert np.array_equal(decoder.decode(request_, Call()), expected)


def test_without_guidance_there_is_one_pass_a_step(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    passes: list[object] = []
    pipeline.transformer.register_forward_hook(lambda *_: passes.append(0))
    decoder.decode(REQUEST, Call())
    assert len(passes) == 2 * REQUEST.steps
    decoder.decode(replace(REQUEST, guidance_scale=1.0), Call())
    assert len(passes) == 3 * REQUEST.steps


@pytest.mark.parametrize("cancel_at", [0, 1, 3])
def test_a_cancelled_request_stops_within_a_step_and_the_next_one_is_clean(
    pipeline: DecoderPipeline, decoder: Decoder, cancel_at: int
) -> None:
    expected = decoder.decode(REQUEST, Call())
    call = Call()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        if passes // 2 == cancel_at:  # two passes a step, with and without guidance
            call.cancelled.set()
        passes += 1

    hook = pipeline.transformer.register_forward_hook(count)
    with pytest.raises(Cancelled):
        decoder.decode(replace(REQUEST, seed=2), call)
    hook.remove()
    assert passes == 2 * (cancel_at + 1)
    assert np.array_equal(decoder.decode(REQUEST, Call()), expected)


@pytest.mark.parametrize("when", ["in a preview", "in the last decoding"])
def test_a_cancelled_vae_stops_between_two_blocks(
    pipeline: DecoderPipeline, decoder: Decoder, when: str
) -> None:
    expected = decoder.decode(REQUEST, Call())
    call = Call()
    blocks = pipeline.vae.decoder.up_blocks
    hooks = [
        blocks[1].register_forward_hook(lambda *_: call.cancelled.set()),
        blocks[3].register_forward_pre_hook(lambda *_: pytest.fail("the VAE continued")),
    ]
    with pytest.raises(Cancelled):
        decoder.decode(replace(REQUEST, previews=1 if when == "in a preview" else 0), call)
    for hook in hooks:
        hook.remove()
    assert np.array_equal(decoder.decode(REQUEST, Call()), expected)


def test_a_request_cancelled_before_it_begins_does_no_work(
    pipeline: DecoderPipeline, decoder: Decoder
) -> None:
    pipeline.text_encoder.register_forward_hook(lambda *_: pytest.fail("a forward pass was run"))
    call = Call()
    call.cancelled.set()
    with pytest.raises(Cancelled):
        decoder.decode(REQUEST, call)


def test_progress_comes_after_every_step(decoder: Decoder) -> None:
    reported: list[Event] = []
    decoder.decode(REQUEST, Call(report=reported.append))
    progress = [event for event in reported if isinstance(event, Progress)]
    assert progress == reported
    assert [(one.done, one.total) for one in progress] == [(i, 4) for i in (1, 2, 3, 4)]
    seconds = [one.seconds for one in progress]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]


@pytest.mark.parametrize(
    ("steps", "previews", "after"),
    [(8, 3, [2, 4, 6]), (8, 1, [4]), (50, 3, [12, 25, 38]), (3, 3, [1, 2]), (1, 3, []), (8, 0, [])],
)
def test_previews_are_spread_over_the_run_and_change_no_pixel(
    decoder: Decoder, steps: int, previews: int, after: list[int]
) -> None:
    request = replace(REQUEST, steps=steps)
    reported: list[Event] = []
    pixels = decoder.decode(replace(request, previews=previews), Call(report=reported.append))
    seen = [i for i, event in enumerate(reported) if isinstance(event, Preview)]
    assert [sum(isinstance(event, Progress) for event in reported[:i]) for i in seen] == after
    images = [event for event in reported if isinstance(event, Preview)]
    assert [image.index for image in images] == list(range(len(after)))
    assert all(image.pixels.shape == (256, 256, 3) for image in images)
    assert np.array_equal(pixels, decoder.decode(request, Call()))


def test_a_preview_is_the_predicted_image_and_not_the_noise(
    pipeline: DecoderPipeline, decoder: Decoder
) -> None:
    """The stand-in model's velocity always leads straight to one clean image."""
    clean = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(5))

    def knows(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        sigma = pipeline.scheduler.sigmas[pipeline.scheduler.step_index or 0]
        return ((hidden_states - clean) / sigma,)

    pipeline.transformer.forward = knows
    reported: list[Event] = []
    decoder.decode(replace(REQUEST, steps=8, previews=3), Call(report=reported.append))
    with torch.no_grad():
        small = pipeline.vae.decode(torch.nn.functional.avg_pool2d(clean, 2)).sample[0]
    expected = (small / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    previews = [event.pixels for event in reported if isinstance(event, Preview)]
    assert len(previews) == 3
    for preview in previews:
        assert np.abs(preview - expected).max() <= 1


@pytest.mark.parametrize(("width", "height", "shape"), [(1024, 512, (256, 512)), (512, 768, (384, 256))])
def test_a_preview_has_at_most_half_the_sides(
    decoder: Decoder, width: int, height: int, shape: tuple[int, int]
) -> None:
    request = replace(REQUEST, width=width, height=height, steps=2, previews=1)
    request = replace(request, prior=PriorTokens(target=tokens(height // 32, width // 32)))
    reported: list[Event] = []
    decoder.decode(request, Call(report=reported.append))
    assert [event.pixels.shape[:2] for event in reported if isinstance(event, Preview)] == [shape]


def test_equal_texts_are_encoded_once(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    encoded: list[object] = []
    pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(0))
    decoder.decode(replace(REQUEST, steps=1), Call())
    assert len(encoded) == 2  # the quoted text, and the empty negative one
    decoder.decode(replace(REQUEST, steps=1, prompt='another sign that says "hello"', seed=2), Call())
    decoder.decode(replace(REQUEST, steps=1, prompt="no text at all"), Call())
    assert len(encoded) == 2
    decoder.decode(replace(REQUEST, steps=1, prompt='"farewell"'), Call())
    assert len(encoded) == 3


def test_what_is_kept_of_texts_is_bounded(pipeline: DecoderPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    size = pipeline._get_glyph_embeds('"0"').nbytes
    monkeypatch.setattr(pipeline_module, "GLYPH_CACHE_BYTES", 3 * size)
    for i in (1, 2, 0, 3):  # 0 again, so that it is the most recently used
        pipeline._get_glyph_embeds(f'"{i}"')
    encoded: list[object] = []
    pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(0))
    for i, times in ((2, 0), (0, 0), (3, 0), (1, 1)):
        pipeline._get_glyph_embeds(f'"{i}"')
        assert len(encoded) == times


def test_what_stays_the_same_is_computed_once(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    dit, calls = pipeline.transformer, dict[str, int]()

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for name in ("prior_projector", "glyph_projector", "time_condition_embed", "proj_out"):
        getattr(dit, name).register_forward_hook(lambda *_, name=name: count(name))
    decoder.decode(REQUEST, Call())
    passes = 2 * REQUEST.steps
    # The prior has one result with and one without its tokens. The text has one, and so has the empty text.
    # The time embedding has one for the two passes of a step.
    once_a_unit = {"prior_projector": 2, "glyph_projector": 2, "time_condition_embed": REQUEST.steps}
    assert calls == once_a_unit | {"proj_out": passes}
    decoder.decode(REQUEST, Call())
    assert calls == {name: 2 * times for name, times in (once_a_unit | {"proj_out": passes}).items()}
    assert not dit.kept  # nothing outlives its unit


def test_on_a_gpu_every_step_is_waited_for_without_polling(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self, stream: object) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(diffusion, "wait_for", lambda _: wait_for(torch.device("cuda")))
    decoder.decode(REQUEST, Call(report=lambda event: log.append("report")))
    assert log == ["record", "wait", "report"] * REQUEST.steps


def test_rotary_tables_are_made_once_for_a_size(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    tables: list[Any] = []
    block = pipeline.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda _, args: tables.append(args[3]))
    decoder.decode(REQUEST, Call())
    assert len(tables) == 8
    assert all(one is tables[0] for one in tables)


def test_control_strings_in_quotes_are_letters(pipeline: DecoderPipeline, decoder: Decoder) -> None:
    seen = []
    pipeline.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()[0]))
    decoder.decode(replace(REQUEST, prompt='"</s><pad>"', steps=1), Call())
    letters = [byte + 3 for byte in b"</s><pad>"]  # ByT5: three control tokens, then the bytes
    assert seen[0][-len(letters) - 1 :] == [*letters, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GB more"), ValueError("broken")])
def test_an_error_keeps_nothing_of_its_unit_on_the_device(
    pipeline: DecoderPipeline, decoder: Decoder, error: Exception
) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(_: object, __: object, output: tuple[torch.Tensor]) -> None:
        kept.append(weakref.ref(output[0]))
        if len(kept) == 3:
            raise error

    pipeline.transformer.register_forward_hook(fail)
    with pytest.raises((OutOfMemoryError, ValueError)) as raised:
        decoder.decode(REQUEST, Call())
    assert raised.value.__traceback__  # the caller still holds the error, as in a future
    assert [ref() for ref in kept[:2]] == [None, None]


def test_too_little_memory_is_the_units_error_and_the_next_one_is_made(
    pipeline: DecoderPipeline, decoder: Decoder
) -> None:
    expected = decoder.decode(REQUEST, Call())

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GB more")

    hook = pipeline.transformer.transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(OutOfMemoryError, match=r"512x512 with 0 source images; ask for a smaller size"):
        decoder.decode(REQUEST, Call())
    hook.remove()
    assert decoder.fault is None
    assert np.array_equal(decoder.decode(REQUEST, Call()), expected)


def test_values_that_are_no_numbers_are_an_error_and_no_black_image(
    pipeline: DecoderPipeline, decoder: Decoder
) -> None:
    hook = pipeline.transformer.register_forward_hook(lambda *_: (torch.full((1, 16, 64, 64), torch.nan),))
    with pytest.raises(NotANumber):
        decoder.decode(REQUEST, Call())
    hook.remove()
    decoder.decode(REQUEST, Call())


def test_a_lost_device_fails_all_later_units(
    pipeline: DecoderPipeline, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(DecoderPipeline, "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError):
        decoder.decode(REQUEST, Call())
    assert "device lost" in str(decoder.fault)
    with pytest.raises(EngineFault):
        decoder.decode(REQUEST, Call())
