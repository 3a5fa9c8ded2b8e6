"""The end of a request: at its deadline, when it does not start, when it is aborted, and in a drain."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from deployments.types import Event as StageEvent
from deployments.types import ImageRequest, PriorTokens, Progress
from serve_app.errors import TimedOut
from serve_app.generation.events import GeneratedImage
from serve_app.generation.gate import Turn
from serve_app.generation.generator import Generator
from tests.unit.serve_app.generation.making import TOKENS, finished, images_of, never, outcome, request

Make = Callable[..., Generator]


def test_a_request_is_stopped_at_its_deadline(make: Make) -> None:
    slow = make(never, deadline_s=0.01)
    with pytest.raises(TimedOut, match=r"longer than the 0\.01 s allowed") as caught:
        asyncio.run(images_of(slow))
    assert (caught.value.code, caught.value.retryable) == ("deadline_exceeded", False)
    assert (slow.units, slow.running.units) == ([], 0)


def test_another_timeout_is_not_taken_for_the_deadline(make: Make) -> None:
    async def main() -> None:
        async with make().admit(request()):
            raise TimeoutError("a disk's")

    with pytest.raises(TimeoutError, match="a disk's"):
        asyncio.run(main())


def test_a_request_that_does_not_start_in_time_is_stopped(make: Make) -> None:
    slow = make(never)
    with pytest.raises(TimedOut, match=r"did not start within 0\.01 s") as caught:
        asyncio.run(images_of(slow, n=2, start_within_s=0.01))
    assert (caught.value.code, caught.value.retryable) == ("start_timeout", False)
    assert (slow.units, slow.running.units) == ([], 0)


def test_a_request_that_has_started_is_stopped_only_at_its_deadline(make: Make) -> None:
    async def slow(_: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
        yield Progress(done=1, total=1280, seconds=0.1)
        await asyncio.sleep(0.2)
        yield TOKENS

    assert asyncio.run(images_of(make(slow), start_within_s=0.1))

    async def stuck(_: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
        yield Progress(done=1, total=1280, seconds=0.1)
        yield await asyncio.Future[PriorTokens]()

    with pytest.raises(TimedOut) as caught:
        asyncio.run(images_of(make(stuck, deadline_s=0.2), start_within_s=0.1))
    assert caught.value.code == "deadline_exceeded"


def test_one_image_that_starts_is_a_start_of_the_request(make: Make) -> None:
    async def one_starts(request: ImageRequest) -> AsyncGenerator[StageEvent | PriorTokens, None]:
        if request.seed == 7:
            yield Progress(done=1, total=1280, seconds=0.1)
        await asyncio.sleep(0.2)
        yield TOKENS

    assert len(asyncio.run(images_of(make(one_starts), n=2, seed=7, start_within_s=0.1))) == 2


def test_a_start_limit_beyond_the_deadline_has_no_effect(make: Make) -> None:
    with pytest.raises(TimedOut) as caught:
        asyncio.run(images_of(make(never, deadline_s=0.01), start_within_s=5))
    assert caught.value.code == "deadline_exceeded"


def test_an_aborted_request_ends_and_frees_its_place(make: Make) -> None:
    changes: list[list[str]] = []

    async def abort() -> str:
        begun = asyncio.Event()

        async def forever(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
            begun.set()
            yield await asyncio.Future[PriorTokens]()

        slow: Generator = make(forever, on_change=lambda: changes.append(slow.running.needed()))
        making = asyncio.create_task(outcome(slow, n=3))
        await begun.wait()
        running = slow.running
        assert (running.count(["m"]), running.count(["other"]), running.units) == (1, 0, 3)
        running.abort(["other"])
        running.abort(["m"])
        running.abort(["m"])
        await asyncio.wait_for(running.until_idle(["m"]), 5)
        assert (running.count(["m"]), running.units, slow.units) == (0, 0, [])
        return await making

    assert asyncio.run(abort()) == "unloaded"
    assert changes == [["m"], []]


def test_a_draining_generator_finishes_its_requests_and_rejects_new_ones(make: Make) -> None:
    async def drain() -> list[str]:
        all_begun = asyncio.Barrier(4)
        go_on = asyncio.Event()

        async def held(_: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
            await all_begun.wait()
            await go_on.wait()
            yield TOKENS

        slow = make(held)
        early = [asyncio.create_task(outcome(slow)) for _ in range(3)]
        await all_begun.wait()
        draining = asyncio.create_task(slow.drain())
        await asyncio.sleep(0)
        late = await outcome(slow)
        assert not draining.done()
        go_on.set()
        await asyncio.wait_for(draining, 5)
        return [late, *[await one for one in early]]

    assert asyncio.run(drain()) == ["stopping", "made", "made", "made"]


def test_a_draining_generator_leaves_jobs_to_the_runner(make: Make) -> None:
    """The runner stops them, and they go back into the queue. An error here would fail them for good."""

    async def main() -> int:
        generator = make()
        resolved = generator.resolve(request())
        await generator.drain()
        async with generator.resume(resolved, turn=Turn(0, 0)) as running:
            return len(await finished(generator, running))

    assert asyncio.run(main()) == 1


def test_a_resumed_request_makes_the_same_image_and_has_the_deadline_of_a_job(
    make: Make, decoded: list[ImageRequest]
) -> None:
    async def main(generator: Generator) -> list[GeneratedImage]:
        async with generator.resume(generator.resolve(request(seed=3, steps=2)), turn=Turn(0, 0)) as running:
            return await finished(generator, running)

    (image,) = asyncio.run(main(make(deadline_s=0.001, job_deadline_s=60)))
    assert (image.facts.seed, decoded[0].seed, decoded[0].steps) == (3, 3, 2)
    with pytest.raises(TimedOut):
        asyncio.run(main(make(never, job_deadline_s=0.01)))
