"""Z-Image's two engines: upstream's embeddings and pixels, whatever the company, and clean ends."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from deployments.config import Acceleration, DecoderConfig, Defaults, ModelConfig, PriorConfig
from deployments.engines.prompts import plain_text
from deployments.errors import (
    Cancelled,
    EngineFault,
    NotANumber,
    OutOfMemoryError,
    RequestTooLong,
    UnsupportedOption,
)
from deployments.families import FAMILIES
from deployments.families.z_image import checkpoint, tiny
from deployments.families.z_image import prior as prior_module
from deployments.families.z_image.decoder import Decoder
from deployments.families.z_image.pipeline import DecoderPipeline
from deployments.families.z_image.prior import PriorEngine
from deployments.stages.calls import Call
from deployments.types import (
    Embedding,
    Event,
    ImageRequest,
    Pixels,
    Preview,
    Progress,
    TextEmbeddings,
)

ON_CPU = DecoderConfig(device="cpu", dtype="float32")
ROWS = 4


def config(decoder: DecoderConfig = ON_CPU, **prior: Any) -> ModelConfig:
    return ModelConfig(
        name="z",
        family="z_image",
        checkpoint="tiny",
        defaults=Defaults(width=512, height=512),
        prior=PriorConfig(device="cpu", dtype="float32", max_batch_size=ROWS, **prior),
        decoder=decoder,
    )


def ask(prompt: str = "a boat", **fields: Any) -> ImageRequest:
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
    engine._asked.put(prior_module._Asked(ask(), Call(), Future()))
    thread.join(10)


@pytest.fixture
def batches(engine: PriorEngine) -> list[tuple[int, ...]]:
    """The shapes that the text encoder is given."""
    shapes: list[tuple[int, ...]] = []
    engine._text_encoder.register_forward_pre_hook(
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
        engine.submit(ask(text, negative_prompt="blurry", guidance_scale=scale), Call())
        for text, scale in zip(prompts, (0, 0, 4, 1), strict=True)
    ]
    threading.Thread(target=engine.run, daemon=True).start()
    wait(futures, 60)
    assert batches == [(ROWS, 512), (1, 512)]  # five texts, since one is asked for twice
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
        return running.submit(ask(prompt), Call()).result(30)

    first = answer("a boat")
    assert np.array_equal(answer("a boat").prompt, first.prompt)
    assert len(batches) == 1
    assert running.done == first.text_tokens == len(first.prompt)
    monkeypatch.setattr(prior_module, "CACHE_BYTES", 2 * first.prompt.nbytes)
    answer("a goat")
    answer("a boat")  # is younger than the goat now
    answer("a coat")  # drives the goat out
    assert len(batches) == 3
    answer("a boat")
    assert len(batches) == 3
    answer("a goat")
    assert len(batches) == 4


def test_on_a_gpu_every_batch_is_of_one_shape(
    running: PriorEngine, batches: list[tuple[int, ...]], upstream: ZImagePipeline
) -> None:
    running._fixed_shape, running._lines = True, 2
    made = running.submit(ask(), Call()).result(30)
    running.submit(ask("a goat", guidance_scale=4), Call()).result(30)
    assert batches == [(2, 512)] * 2
    assert np.array_equal(made.prompt, upstreams(upstream, "a boat"))


def test_progress_is_told(running: PriorEngine) -> None:
    told: list[Any] = []
    made = running.submit(ask(guidance_scale=4), Call(report=told.append)).result(30)
    assert [(event.done, event.total) for event in told] == [
        (0, made.text_tokens),
        (made.text_tokens, made.text_tokens),
    ]


def test_control_tokens_in_a_prompt_are_letters(running: PriorEngine) -> None:
    plain = running.submit(ask("a boat"), Call()).result(30).text_tokens
    made = running.submit(ask("a boat<|im_end|>"), Call()).result(30)
    assert made.text_tokens > plain + len("<|im_end|>")  # a letter each, and what breaks them up


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_a_text_that_upstream_would_cut_is_refused_and_its_company_is_not(
    running: PriorEngine, param: str
) -> None:
    texts: list[dict[str, Any]] = [{param: "x" * 500}, {}, {}]
    futures = [running.submit(ask(guidance_scale=4, **fields), Call()) for fields in texts]
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
    bad, good = running.submit(ask("bad"), Call()), running.submit(ask(), Call())
    with pytest.raises(ZeroDivisionError):
        bad.result(30)
    assert len(good.result(30).prompt)


def test_a_text_may_fill_its_row(running: PriorEngine) -> None:
    def tokens(letters: int) -> int:
        return running.submit(ask("x" * letters), Call()).result(30).text_tokens

    most = 512 - tokens(0)
    assert tokens(most) == 512
    with pytest.raises(RequestTooLong, match="513"):
        tokens(most + 1)


def test_what_is_cancelled_before_it_began_is_not_encoded(
    engine: PriorEngine, batches: list[tuple[int, ...]]
) -> None:
    cancelled = engine.submit(ask("a boat"), Call())
    assert cancelled.cancel()
    kept = engine.submit(ask("a goat"), Call())
    threading.Thread(target=engine.run, daemon=True).start()
    kept.result(30)
    assert batches == [(1, 512)]


@pytest.mark.parametrize(
    ("raised", "told"),
    [(torch.OutOfMemoryError("no more"), OutOfMemoryError), (RuntimeError("broken"), RuntimeError)],
)
def test_a_failure_is_its_batchs_and_the_engine_goes_on(
    running: PriorEngine, raised: Exception, told: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise raised

    hook = running._text_encoder.register_forward_pre_hook(fail)
    with pytest.raises(told):
        running.submit(ask(), Call()).result(30)
    hook.remove()
    assert len(running.submit(ask(), Call()).result(30).prompt)
    assert running.fault is None


def test_what_is_no_number_is_not_kept(running: PriorEngine) -> None:
    def spoil(_: object, __: object, output: Any) -> None:
        output.last_hidden_state.fill_(torch.nan)

    hook = running._text_encoder.register_forward_hook(spoil)
    with pytest.raises(NotANumber):
        running.submit(ask(), Call()).result(30)
    hook.remove()
    assert np.isfinite(running.submit(ask(), Call()).result(30).prompt).all()


def test_after_a_fault_nobody_waits(engine: PriorEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [engine.submit(ask(str(i)), Call()) for i in range(ROWS + 2)]

    def lose(asked: list[Any], error: Exception) -> None:
        engine.fault = EngineFault("the device is lost")
        for one in asked:
            one.future.set_exception(engine.fault)

    monkeypatch.setattr(engine, "_encode", lambda _: 1 / 0)
    monkeypatch.setattr(engine, "_fail", lose)
    engine.run()
    for future in waiting:
        with pytest.raises(EngineFault):
            future.result(0)
    with pytest.raises(EngineFault):
        engine.submit(ask(), Call())


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
    told: list[Event] = []
    decoder.decode(replace(request_, previews=3), Call(report=told.append))
    assert [(event.done, event.total) for event in told if isinstance(event, Progress)] == [
        (step, steps) for step in range(1, steps + 1)
    ]
    previews = [event for event in told if isinstance(event, Preview)]
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
    told: list[Event] = []
    decoder.decode(replace(request_, previews=3), Call(report=told.append))
    previews = [event.pixels.astype(int) for event in told if isinstance(event, Preview)]
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


@pytest.mark.parametrize("options", [{"quantization": "fp8"}, {"vae_tiling": True}])
def test_options_are_had(options: dict[str, Any]) -> None:
    wide = replace(REQUEST, width=1056, steps=2)  # more than one of the VAE's tiles
    plain, other = load().decode(wide, Call()), load(**options).decode(wide, Call())
    assert not np.array_equal(plain, other)
    assert np.abs(plain.astype(float) - other).mean() < 20


def differing(request: ImageRequest, text_tokens: int) -> ImageRequest:
    """The request with another negative text."""
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


def test_what_cannot_be_had_is_refused_when_it_loads() -> None:
    with pytest.raises(UnsupportedOption, match=r"acceleration\.step_cache .* set it to 0"):
        load(step_cache=0.1)


@pytest.mark.parametrize(
    ("defaults", "scales"),
    [
        ({}, (4, 1.5)),
        ({"guidance_scale": 0.0}, (0, 1.5)),
        ({"guidance_scale": 0.0, "edit_guidance_scale": 0.0}, (0, 0)),
    ],
)
def test_the_configuration_goes_before_the_family(
    defaults: dict[str, float], scales: tuple[float, float]
) -> None:
    model = ModelConfig.model_validate(config().model_dump() | {"defaults": defaults})
    assert (model.guidance_scale(editing=False), model.guidance_scale(editing=True)) == scales


def test_rows_are_the_familys_unless_said_otherwise() -> None:
    assert config().max_sequence_length == FAMILIES["z_image"].max_sequence_length == 512
    assert config(max_sequence_length=100).max_sequence_length == 100
