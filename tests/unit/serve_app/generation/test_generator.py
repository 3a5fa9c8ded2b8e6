"""The path of a request over stand-ins for the stages: seeds, defaults, and failures among several images."""

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from deployments.errors import LoadingFailed, NotANumber, OtherWeights, OutOfMemoryError, RequestTooLong
from deployments.types import Event as StageEvent
from deployments.types import ImageRequest, Pixels, Preview, PriorTokens, Progress
from serve_app.errors import Failed, InvalidParameter, NotFound, ReplicaDied
from serve_app.generation import unit
from serve_app.generation.events import Event, GeneratedImage, PartialImage, StageProgress
from serve_app.generation.generator import Generator
from serve_app.generation.request import MAX_SEED
from tests.unit.serve_app.generation.making import PREVIEW, TOKENS, collect, failing, images_of, request

Make = Callable[..., Generator]


def refused(generator: Generator, **fields: Any) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as caught:
        asyncio.run(images_of(generator, **fields))
    return caught.value


def test_omitted_parameters_get_the_models_defaults(make: Make, decoded: list[ImageRequest]) -> None:
    (image,) = asyncio.run(images_of(make()))
    (request,) = decoded
    assert (request.width, request.height) == (1024, 1024)
    assert (request.steps, request.guidance_scale) == (50, 1.5)
    assert image.facts.seed == request.seed
    assert 0 <= image.facts.seed < 2**53


def test_an_image_larger_than_requested_is_cropped_to_its_middle(
    make: Make, decoded: list[ImageRequest]
) -> None:
    (image,) = asyncio.run(images_of(make(), size=(1280, 736), crop=(1279, 720)))
    (request,) = decoded
    assert (request.width, request.height) == (1280, 736)
    assert image.pixels.shape == (720, 1279, 3)


def test_source_images_are_shared_once_for_all_images_and_both_stages(
    make: Make, decoded: list[ImageRequest]
) -> None:
    shared: list[tuple[Pixels, ...]] = []
    started: list[ImageRequest] = []

    def share(pixels: tuple[Pixels, ...]) -> str:
        shared.append(pixels)
        return "a reference"

    async def prior(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        started.append(request)
        yield TOKENS

    file = io.BytesIO()
    Image.new("RGB", (512, 512)).save(file, "PNG")
    asyncio.run(images_of(make(prior, share=share), n=3, sources=(file.getvalue(),)))
    ((pixels,),) = shared
    assert pixels.shape == (512, 512, 3)
    sent: list[Any] = [request.sources for request in started + decoded]
    assert sent == ["a reference"] * 6
    asyncio.run(images_of(make(share=share)))
    assert len(shared) == 1
    assert decoded[-1].sources == ()


def test_a_familys_name_stands_for_its_first_model_unless_a_model_has_it(make: Make) -> None:
    assert make(names=("a", "b")).model("glm-image").name == "a"
    assert make(names=("a", "glm-image")).model("glm-image").name == "glm-image"
    assert make(names=("a",)).resolve(request(model="glm-image")).model == "a"
    with pytest.raises(NotFound, match="there are: a") as caught:
        make(names=("a",)).model("glm_image")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_zero_is_a_value_of_its_own(make: Make, decoded: list[ImageRequest]) -> None:
    asyncio.run(images_of(make(), guidance_scale=0, seed=0))
    assert (decoded[0].guidance_scale, decoded[0].seed) == (0, 0)


def test_seeds_follow_each_other_up_to_the_largest_one(make: Make, decoded: list[ImageRequest]) -> None:
    images = asyncio.run(images_of(make(), n=2, seed=MAX_SEED - 1))
    assert [image.facts.seed for image in images] == [MAX_SEED - 1, MAX_SEED]
    decoded.clear()
    error = refused(make(), n=3, seed=MAX_SEED - 1)
    assert (error.param, error.problem) == ("seed", f"must be 0 to {MAX_SEED - 2}, not {MAX_SEED - 1}")
    assert refused(make(), seed=MAX_SEED + 1).param == "seed"
    assert refused(make(), seed=-1).param == "seed"
    assert decoded == []


def test_images_come_in_the_order_of_their_seeds_however_long_they_take(make: Make) -> None:
    first_may_end = asyncio.Event()

    async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
        if request.seed == 7:
            await first_may_end.wait()
        else:
            first_may_end.set()
        yield PREVIEW

    images = asyncio.run(images_of(make(decode=decode), n=2, seed=7))
    assert [(image.image, image.facts.seed) for image in images] == [(0, 7), (1, 8)]


def test_an_image_restarts_if_the_decoder_has_other_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update replaces the stages one after the other: either may be ahead."""
    monkeypatch.setattr(unit, "UPDATE_RETRY_S", 0)
    priors, decoders = iter("aab"), iter("bbb")

    async def prior(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        yield replace(TOKENS, weights=next(priors))

    async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
        if request.prior and request.prior.weights != next(decoders):
            raise OtherWeights
        yield PREVIEW

    (image,) = asyncio.run(images_of(make(prior, decode)))
    assert image.pixels is PREVIEW
    assert (next(priors, None), next(decoders, None)) == (None, None)


def test_one_failing_image_stops_the_others(make: Make) -> None:
    stopped: list[int] = []

    async def prior(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        if request.seed == 12:
            raise RuntimeError("broken")
        try:
            yield await asyncio.Future[PriorTokens]()
        except asyncio.CancelledError:
            stopped.append(request.seed)
            raise

    generator = make(prior)
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(images_of(generator, n=3, seed=10))
    assert sorted(stopped) == [10, 11]
    assert generator.units == []


def test_a_caller_that_stops_listening_stops_all_images(make: Make) -> None:
    stopped: list[int] = []

    async def decode(request: ImageRequest) -> AsyncGenerator[StageEvent | Pixels, None]:
        try:
            yield Progress(done=1, total=2, seconds=0.1)
            yield await asyncio.Future[Pixels]()
        finally:
            stopped.append(request.seed)

    async def main() -> None:
        generator = make(decode=decode)
        async with generator.admit(request(n=2, seed=5)) as running:
            events = generator.run(running)
            seen = 0
            async for event in events:
                seen += isinstance(event, StageProgress) and event.stage == "decoder"
                if seen == 2:
                    break
            await events.aclose()
            assert generator.units == []

    asyncio.run(main())
    assert sorted(stopped) == [5, 6]


def test_the_progress_of_every_image_is_reported(make: Make) -> None:
    events: list[Event] = []
    asyncio.run(collect(make(), events, n=2, steps=3, partial_images=1))
    for image in (0, 1):
        first, second, preview, last = [event for event in events if event.image == image]
        prior_progress = Progress(done=256, total=1280, seconds=0.5)
        assert first == StageProgress(image=image, stage="prior", progress=prior_progress)
        decoder_progress = Progress(done=1, total=3, seconds=0.1)
        assert second == StageProgress(image=image, stage="decoder", progress=decoder_progress)
        assert isinstance(preview, PartialImage)
        assert preview.pixels is PREVIEW
        assert isinstance(last, GeneratedImage)


def test_a_prompt_too_long_for_the_model_is_an_error_of_the_prompt(make: Make) -> None:
    error = refused(make(failing(RequestTooLong(5000, 4096))))
    assert "makes 5000 tokens" in error.problem
    assert "at most 4096" in error.problem
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")


def test_an_image_whose_replica_dies_is_made_once_more(make: Make, decoded: list[ImageRequest]) -> None:
    calls: list[ImageRequest] = []

    async def dies_once(request: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
        calls.append(request)
        yield Progress(done=1, total=1280, seconds=0.1)
        if len(calls) == 1:
            raise ReplicaDied
        yield TOKENS

    (image,) = asyncio.run(images_of(make(dies_once)))
    assert calls[0] == calls[1]
    assert [request.seed for request in decoded] == [image.facts.seed]


def test_no_preview_is_shown_twice_if_the_decoder_dies(make: Make) -> None:
    calls: list[ImageRequest] = []

    async def dies_once(request: ImageRequest) -> AsyncGenerator[StageEvent | Pixels, None]:
        calls.append(request)
        yield Progress(done=1, total=4, seconds=0.1)
        yield Preview(index=0, pixels=PREVIEW)
        if len(calls) == 1:
            raise ReplicaDied
        yield Preview(index=1, pixels=PREVIEW)
        yield PREVIEW

    events: list[Event] = []
    asyncio.run(collect(make(decode=dies_once), events, partial_images=2))
    assert len(calls) == 2
    assert [event.index for event in events if isinstance(event, PartialImage)] == [0, 1]


def test_an_image_whose_replicas_keep_dying_fails(make: Make) -> None:
    with pytest.raises(Failed, match="died twice") as caught:
        asyncio.run(images_of(make(failing(ReplicaDied()))))
    assert (caught.value.code, caught.value.retryable) == ("replica_died", False)


@pytest.mark.parametrize("stage", ["prior", "decode"])
def test_values_that_are_not_finite_are_no_reason_to_try_again(make: Make, stage: str) -> None:
    calls: dict[str, Any] = {stage: failing(NotANumber("nan"))}
    with pytest.raises(Failed, match="not finite; use another seed") as caught:
        asyncio.run(images_of(make(**calls)))
    assert (caught.value.code, caught.value.retryable) == ("not_finite", False)


@pytest.mark.parametrize("stage", ["prior", "decode"])
def test_too_little_memory_is_an_error_with_advice(make: Make, stage: str) -> None:
    calls: dict[str, Any] = {stage: failing(OutOfMemoryError("2 GB more"))}
    with pytest.raises(Failed, match=r"too little memory for 1024x1024 .* Choose a smaller size") as caught:
        asyncio.run(images_of(make(**calls)))
    assert (caught.value.code, caught.value.retryable) == ("out_of_memory", False)


def test_the_number_of_previews_is_bounded(make: Make) -> None:
    assert str(refused(make(), partial_images=4)) == "partial_images must be 0 to 3, not 4."


def test_a_model_that_cannot_be_loaded_is_reported_with_the_reason(make: Make) -> None:
    submitted_at: list[float] = []

    async def broken(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        submitted_at.append(request.submitted_at)
        raise LoadingFailed("no such folder")
        yield

    before = time.time()
    with pytest.raises(Failed, match="Model loading failed: no such folder") as caught:
        asyncio.run(images_of(make(broken)))
    assert (caught.value.code, caught.value.retryable) == ("model_loading_failed", False)
    assert before <= submitted_at[0] <= time.time()
