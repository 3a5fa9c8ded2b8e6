"""The path of a request over stages that stand in for Ray's: seeds, defaults, and failures among several."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from deployments.config import ModelConfig
from deployments.errors import LoadingFailed, OtherWeights, OutOfMemoryError, RequestTooLong
from deployments.types import Event, ImageRequest, Pixels, Preview, PriorTokens, Progress
from serve_app.app import _caller
from serve_app.config import Limits
from serve_app.errors import InvalidParameter, ReplicaDied, RequestError
from serve_app.generation import image as unit
from serve_app.generation.generator import Generator
from serve_app.generation.image import Model
from serve_app.generation.request import MAX_SEED, GeneratedImage, Generation, PartialImage, StageProgress

PREVIEW = np.zeros((2, 2, 3), dtype=np.uint8)
TOKENS = PriorTokens(target=np.zeros((32, 32), dtype=np.int64))
Prior = Callable[[ImageRequest], AsyncGenerator[Event | PriorTokens, None]]


async def prior(_: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
    yield Progress(done=256, total=1280, seconds=0.5)
    yield TOKENS


@pytest.fixture
def decoded() -> list[ImageRequest]:
    """What the decoder was asked for."""
    return []


@pytest.fixture
def generator(
    model_config: Callable[..., ModelConfig], decoded: list[ImageRequest]
) -> Callable[..., Generator]:
    async def decode(request: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        decoded.append(request)
        yield Progress(done=1, total=request.steps, seconds=0.1)
        if request.previews:
            yield Preview(index=0, pixels=PREVIEW)
        yield np.zeros((request.height, request.width, 3), dtype=np.uint8)

    def make(prior: Prior = prior) -> Generator:
        return Generator({"m": Model(config=model_config(), prior=prior, decode=decode)}, Limits())

    return make


def test_what_is_left_out_gets_the_models_defaults(
    generator: Callable[..., Generator], decoded: list[ImageRequest]
) -> None:
    (image,) = asyncio.run(generator().run(Generation(prompt="a boat")))
    (request,) = decoded
    assert (request.width, request.height) == (1024, 1024)
    assert (request.steps, request.guidance_scale) == (50, 1.5)
    assert image.seed == request.seed
    assert 0 <= image.seed < 2**53


def test_only_the_middle_is_kept_of_an_image_that_is_larger_than_wanted(
    generator: Callable[..., Generator], decoded: list[ImageRequest]
) -> None:
    wanted = Generation(prompt="a boat", size=(1280, 736), crop=(1279, 720))
    (image,) = asyncio.run(generator().run(wanted))
    (request,) = decoded
    assert (request.width, request.height) == (1280, 736)
    assert image.pixels.shape == (720, 1279, 3)


def test_a_familys_name_stands_for_its_first_model_unless_a_model_has_it(
    model_config: Callable[..., ModelConfig], decoded: list[ImageRequest]
) -> None:
    def generator(*names: str) -> Generator:
        configs = [model_config().model_copy(update={"name": name}) for name in names]
        models = {one.name: Model(config=one, prior=prior, decode=decode) for one in configs}
        return Generator(models, Limits())

    async def decode(_: ImageRequest) -> AsyncGenerator[Event | Pixels, None]:
        yield PREVIEW

    assert generator("a", "b").model("glm-image").name == "a"
    assert generator("a", "glm-image").model("glm-image").name == "glm-image"
    assert generator("a").resolved(Generation(prompt="a boat", model="glm-image")).model == "a"
    with pytest.raises(RequestError, match="there are: a"):
        generator("a").model("glm_image")


def test_zero_is_a_value_and_not_left_out(
    generator: Callable[..., Generator], decoded: list[ImageRequest]
) -> None:
    asyncio.run(generator().run(Generation(prompt="a boat", guidance_scale=0, seed=0)))
    assert (decoded[0].guidance_scale, decoded[0].seed) == (0, 0)


def test_after_the_largest_seed_comes_zero(generator: Callable[..., Generator]) -> None:
    images = asyncio.run(generator().run(Generation(prompt="a boat", n=3, seed=MAX_SEED - 1)))
    assert [image.seed for image in images] == [MAX_SEED - 1, MAX_SEED, 0]
    assert refused(generator(), Generation(prompt="a boat", seed=MAX_SEED + 1)).param == "seed"


def test_an_image_whose_decoder_is_of_another_model_begins_again(
    model_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while an update replaces the stages: first one is ahead, then the other."""
    monkeypatch.setattr(unit, "UPDATE_S", 0)
    priors, decoders = iter("aab"), iter("bbb")

    async def prior(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        yield replace(TOKENS, weights=next(priors))

    async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
        if request.prior and request.prior.weights != next(decoders):
            raise OtherWeights
        yield PREVIEW

    model = Model(config=model_config(), prior=prior, decode=decode)
    (image,) = asyncio.run(Generator({"m": model}, Limits()).run(Generation(prompt="a boat")))
    assert image.pixels is PREVIEW
    assert (next(priors, None), next(decoders, None)) == (None, None)


def test_one_failing_image_stops_the_others(generator: Callable[..., Generator]) -> None:
    stopped: list[int] = []

    async def failing(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        if request.seed == 12:
            raise RuntimeError("broken")
        try:
            yield await asyncio.Future[PriorTokens]()
        except asyncio.CancelledError:
            stopped.append(request.seed)
            raise

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(generator(failing).run(Generation(prompt="a boat", n=3, seed=10)))
    assert sorted(stopped) == [10, 11]


def test_the_progress_of_every_image_is_told(generator: Callable[..., Generator]) -> None:
    told: list[Any] = []
    asyncio.run(generator().run(Generation(prompt="a boat", n=2, steps=3, partial_images=1), told.append))
    for image in (0, 1):
        of_image = [one for one in told if not isinstance(one, GeneratedImage) and one.image == image]
        assert of_image[:2] == [
            StageProgress(image=image, stage="prior", progress=Progress(done=256, total=1280, seconds=0.5)),
            StageProgress(image=image, stage="decoder", progress=Progress(done=1, total=3, seconds=0.1)),
        ]
        (preview,) = of_image[2:]
        assert isinstance(preview, PartialImage)
        assert preview.pixels is PREVIEW
    assert sum(isinstance(one, GeneratedImage) for one in told) == 2


def test_a_request_longer_than_a_row_is_the_clients_to_shorten(generator: Callable[..., Generator]) -> None:
    async def too_long(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        raise RequestTooLong(5000, 4096)
        yield

    with pytest.raises(InvalidParameter, match=r"makes 5000 tokens .* at most 4096") as caught:
        asyncio.run(generator(too_long).run(Generation(prompt="a boat")))
    assert caught.value.param == "prompt"


def test_a_unit_whose_replica_dies_is_made_once_more(
    decoded: list[ImageRequest],
    generator: Callable[..., Generator],
) -> None:
    asked: list[ImageRequest] = []

    async def dies_once(request: ImageRequest) -> AsyncGenerator[Event | PriorTokens, None]:
        asked.append(request)
        yield Progress(done=1, total=1280, seconds=0.1)
        if len(asked) == 1:
            raise ReplicaDied
        yield TOKENS

    (image,) = asyncio.run(generator(dies_once).run(Generation(prompt="a boat")))
    assert asked[0] == asked[1]
    assert [request.seed for request in decoded] == [image.seed]


def test_a_unit_whose_replicas_keep_dying_is_given_up(generator: Callable[..., Generator]) -> None:
    async def dies(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        raise ReplicaDied
        yield

    with pytest.raises(RequestError, match="died twice") as caught:
        asyncio.run(generator(dies).run(Generation(prompt="a boat")))
    assert (caught.value.status, caught.value.headers) == (500, {"x-should-retry": "false"})


async def never(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
    yield await asyncio.Future[PriorTokens]()


def test_a_request_that_takes_too_long_is_stopped(
    model_config: Callable[..., ModelConfig], generator: Callable[..., Generator]
) -> None:
    models = {"m": Model(config=model_config(), prior=never, decode=never)}  # type: ignore[arg-type]
    slow = Generator(models, Limits(deadline_s=0.01))

    async def main() -> None:
        request = Generation(prompt="a boat")
        async with slow.admitted(request, sources=0):
            await slow.run(request)

    with pytest.raises(RequestError, match=r"longer than the 0\.01 s allowed") as caught:
        asyncio.run(main())
    assert (caught.value.status, caught.value.headers) == (504, {"x-should-retry": "false"})
    assert slow.units == []


def test_a_timeout_of_something_else_is_not_the_deadline(generator: Callable[..., Generator]) -> None:
    async def main() -> None:
        async with generator().admitted(Generation(prompt="a boat"), sources=0):
            raise TimeoutError("a disk's")

    with pytest.raises(TimeoutError, match="a disk's"):
        asyncio.run(main())


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_too_little_memory_is_an_error_with_advice(
    model_config: Callable[..., ModelConfig], stage: str
) -> None:
    async def fails(_: object) -> AsyncGenerator[Any, None]:
        raise OutOfMemoryError("2 GB more")
        yield

    stages = {"prior": prior, "decode": fails} if stage == "decoder" else {"prior": fails, "decode": fails}
    generator = Generator({"m": Model(config=model_config(), **stages)}, Limits())
    with pytest.raises(
        RequestError, match=r"too little memory for 1024x1024 .* Choose a smaller size"
    ) as caught:
        asyncio.run(generator.run(Generation(prompt="a boat")))
    assert caught.value.status == 500


def refused(generator: Generator, generation: Generation, *, sources: int = 0) -> InvalidParameter:
    async def main() -> None:
        async with generator.admitted(generation, sources=sources):
            pytest.fail("it was admitted")

    with pytest.raises(InvalidParameter) as caught:
        asyncio.run(main())
    return caught.value


def test_previews_are_bounded(generator: Callable[..., Generator]) -> None:
    error = refused(generator(), Generation(prompt="a boat", partial_images=4))
    assert str(error) == "partial_images must be 0 to 3, not 4"


class Items:
    """What a streaming handle returns: waits for ever, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.cancelled = False

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> Any:
        if self._error:
            raise self._error
        return await asyncio.Future[Any]()

    def cancel(self) -> None:
        if self._error:
            raise self._error  # as Serve's does
        self.cancelled = True


class Method:
    """Stands in for a method of a Serve handle."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def options(self, *, stream: bool) -> "Method":
        assert stream
        return self

    def remote(self, _: object) -> Items:
        return self._items


def test_a_cancelled_call_is_cancelled_at_the_stage() -> None:
    async def main() -> bool:
        items = Items()
        call = _caller(Method(items))("request")  # type: ignore[arg-type]
        task = asyncio.create_task(anext(call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return items.cancelled

    assert asyncio.run(main())


def test_serves_back_pressure_is_an_error_of_ours() -> None:
    async def main() -> None:
        items = Items(BackPressureError(num_queued_requests=1, max_queued_requests=1))
        await anext(_caller(Method(items))("request"))  # type: ignore[arg-type]

    with pytest.raises(RequestError) as caught:
        asyncio.run(main())
    assert caught.value.status == 429


async def make(generator: Generator, **fields: Any) -> str | int:
    """What becomes of a request: `made`, or the status of its error."""
    generation = Generation(prompt="a boat", **fields)
    try:
        async with generator.admitted(generation, sources=0):
            await generator.run(generation)
    except RequestError as error:
        return error.status
    return "made"


def test_a_request_that_is_called_off_ends_and_its_place_is_free(
    generator: Callable[..., Generator],
) -> None:
    changes: list[list[str]] = []

    async def call_off() -> str | int:
        begun = asyncio.Event()

        async def forever(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
            begun.set()
            yield await asyncio.Future[PriorTokens]()

        slow = generator(forever)
        slow._on_change = lambda: changes.append(slow.needed())
        making = asyncio.create_task(make(slow, n=3))
        await begun.wait()
        assert (slow.count(["m"]), slow.count(["other"]), slow.pending) == (1, 0, 3)
        slow.call_off(["other"])
        slow.call_off(["m"])
        slow.call_off(["m"])
        await asyncio.wait_for(slow.until_idle(["m"]), 5)
        assert (slow.count(["m"]), slow.pending, slow.units) == (0, 0, [])
        return await making

    assert asyncio.run(call_off()) == 503
    assert changes == [["m"], []]


def test_a_generator_that_drains_finishes_what_it_has_and_takes_nothing_more(
    generator: Callable[..., Generator],
) -> None:
    async def drain() -> list[str | int]:
        all_begun = asyncio.Barrier(4)
        go_on = asyncio.Event()

        async def held(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
            await all_begun.wait()
            await go_on.wait()
            yield TOKENS

        slow = generator(held)
        early = [asyncio.create_task(make(slow)) for _ in range(3)]
        await all_begun.wait()
        draining = asyncio.create_task(slow.drain())
        await asyncio.sleep(0)
        late = await make(slow)
        assert not draining.done()
        go_on.set()
        await asyncio.wait_for(draining, 5)
        return [late, *[await one for one in early]]

    assert asyncio.run(drain()) == [503, "made", "made", "made"]


def test_a_model_that_cannot_be_loaded_is_told_with_the_reason(generator: Callable[..., Generator]) -> None:
    submitted_at: list[float] = []

    async def broken(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        submitted_at.append(request.submitted_at)
        raise LoadingFailed("no such folder")
        yield

    before = time.time()
    with pytest.raises(RequestError, match="Model loading failed: no such folder") as caught:
        asyncio.run(generator(broken).run(Generation(prompt="a boat")))
    assert (caught.value.status, caught.value.headers["x-should-retry"]) == (500, "false")
    assert before <= submitted_at[0] <= time.time()
