"""Images of jobs enter a stage only where they hold up no request."""

import asyncio

from serve_app.generation.gate import Gate, Turn


class Visitors:
    """Images that enter a gate, and stay until they are told to leave.

    Attributes:
        inside: names of the images in the stage, in the order of their entry.
        visits: the tasks of all images, by name.
        leaving: events that end their visits.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.visits: dict[str, asyncio.Task[None]] = {}
        self.leaving: dict[str, asyncio.Event] = {}
        self.inside: list[str] = []

    async def come(self, name: str, turn: float | None = None, priority: int = 0) -> None:
        self.leaving[name] = asyncio.Event()
        self.visits[name] = asyncio.create_task(
            self._visit(name, None if turn is None else Turn(priority, turn))
        )
        await self.settle()

    async def _visit(self, name: str, turn: Turn | None) -> None:
        async with self._gate.enter(turn):
            self.inside.append(name)
            try:
                await self.leaving[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self.leaving[name].set()
        await self.visits[name]
        await self.settle()

    async def stop(self, name: str) -> None:
        self.visits[name].cancel()
        await asyncio.wait([self.visits[name]])
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def test_as_many_images_of_jobs_enter_as_are_worked_on_in_the_order_of_their_turns() -> None:
    async def main() -> None:
        images = Visitors(Gate("decoder", 2, 2))
        for name, turn in (("a", 1.0), ("b", 1.0), ("late", 3.0), ("early", 2.0)):
            await images.come(name, turn)
        assert images.inside == ["a", "b"]
        await images.leave("a")
        assert images.inside == ["b", "early"]
        await images.leave("b")
        assert images.inside == ["early", "late"]

    asyncio.run(main())


def test_a_request_enters_at_once_and_images_of_jobs_wait_for_it() -> None:
    async def main() -> None:
        gate = Gate("decoder", 1, 1)
        images = Visitors(gate)
        await images.come("job", 0)
        await images.come("next", 1)
        assert gate.takes_jobs
        await images.come("person")
        assert images.inside == ["job", "person"]
        assert not gate.takes_jobs
        await images.leave("job")
        assert images.inside == ["person"], "the next image of a job would take the person's place"
        await images.leave("person")
        assert images.inside == ["next"]

    asyncio.run(main())


def test_a_place_may_be_kept_free_of_jobs() -> None:
    async def main() -> None:
        images = Visitors(Gate("decoder", 3, 2))
        for turn in range(3):
            await images.come(f"job {turn}", turn)
        assert images.inside == ["job 0", "job 1"]
        await images.come("person")
        assert images.inside == ["job 0", "job 1", "person"]

    asyncio.run(main())


def test_an_image_that_is_stopped_gives_its_place_back() -> None:
    async def main() -> None:
        images = Visitors(Gate("decoder", 1, 1))
        for turn, name in enumerate(("inside", "waiting", "last")):
            await images.come(name, turn)
        await images.stop("waiting")
        await images.stop("inside")
        assert images.inside == ["last"]

    asyncio.run(main())


def test_images_of_low_priority_enter_after_all_others() -> None:
    async def main() -> None:
        images = Visitors(Gate("decoder", 1, 1))
        await images.come("inside", 1.0)
        await images.come("low", 0.0, priority=1)
        await images.come("normal", 50_000.0)
        await images.leave("inside")
        assert images.inside == ["normal"]
        await images.leave("normal")
        assert images.inside == ["low"]

    asyncio.run(main())


def test_an_image_that_is_stopped_on_its_way_in_gives_its_place_back() -> None:
    async def main() -> None:
        gate = Gate("decoder", 1, 1)
        images = Visitors(gate)

        async def first() -> None:
            async with gate.enter(Turn(0, 0)):
                await images.come("second", 1)
                await images.come("third", 2)
            images.visits["second"].cancel()  # it has the place, and has not gone on yet

        await first()
        await asyncio.wait([images.visits["second"]])
        await images.settle()
        assert images.inside == ["third"]

    asyncio.run(main())
