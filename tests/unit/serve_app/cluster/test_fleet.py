"""Limits over several ingress replicas, with the actor as a plain object."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve_app.cluster import fleet as fleet_module
from serve_app.cluster.fleet import Fleet, FleetClient
from serve_app.config import Limits
from serve_app.errors import Busy
from serve_app.generation.admission import Admission


class Actor:
    """Stands in for the client of the actor.

    Attributes:
        error: what every call raises; None if the actor answers.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.error: Exception | None = None
        self._told: set[asyncio.Task[Any]] = set()

    async def ask(self, method: str, *args: Any) -> Any:
        if self.error:
            raise self.error
        return await getattr(self.fleet, method)(*args)

    def tell(self, method: str, *args: Any) -> None:
        self._told.add(asyncio.create_task(self.ask(method, *args)))

    async def delivered(self) -> None:
        """Returns when all that was told has been done."""
        await asyncio.gather(*self._told, return_exceptions=True)
        self._told.clear()


class Replica:
    """One ingress replica."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self.actor = Actor(fleet)
        actor: Any = self.actor
        self.client = FleetClient(actor)
        self.admission = Admission(limits, self.client)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


async def accepted(replica: Replica, units: int, key_id: str = "") -> bool:
    """Returns whether a request is accepted that ends at once."""
    try:
        async with replica.admission.permit(units, key_id):
            return True
    except Busy:
        return False
    finally:
        await replica.actor.delivered()


def test_places_are_bounded_over_all_replicas() -> None:
    async def main() -> None:
        fleet, limits = Fleet(), Limits(max_pending=10, max_pending_per_key=4)
        one, two = Replica(fleet, limits), Replica(fleet, limits)
        async with one.admission.permit(3, "a"):
            with pytest.raises(Busy, match="Your key has 3 images to make and may have 4") as caught:
                async with two.admission.permit(2, "a"):
                    pass
            assert caught.value.retry_after_s
            assert await accepted(two, 1, "a")
            async with two.admission.permit(4, "b"):
                with pytest.raises(Busy, match="The server has 7 images to make and may have 10"):
                    async with one.admission.permit(4, "c"):
                        pass
                assert two.admission.pending == 4, "the metric of this replica"
            await two.actor.delivered()
            assert await accepted(one, 4, "c")
        await one.actor.delivered()
        assert await accepted(two, 4, "a")

    asyncio.run(main())


def test_a_killed_replica_gives_its_places_back() -> None:
    async def main() -> None:
        fleet, limits = Fleet(lease_s=0.05), Limits(max_pending=10)
        killed, other = Replica(fleet, limits), Replica(fleet, limits)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(killed.admission.permit(10, ""))
            assert not await accepted(other, 1)
            async with asyncio.timeout(5):
                while not await accepted(other, 10):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_replica_that_reports_keeps_its_places() -> None:
    async def main() -> None:
        fleet, limits = Fleet(lease_s=0.1), Limits(max_pending=10)
        busy, other = Replica(fleet, limits), Replica(fleet, limits)
        async with busy.admission.permit(10, ""):
            for _ in range(10):
                await asyncio.sleep(0.03)
                await busy.client.report({})
                assert not await accepted(other, 1)

    asyncio.run(main())


def test_the_rate_of_a_key_holds_over_all_replicas() -> None:
    async def main() -> None:
        fleet, limits = Fleet(), Limits(megapixel_steps_per_minute=100, max_megapixel_steps=100)
        one, two = Replica(fleet, limits), Replica(fleet, limits)
        await one.admission.charge(60, "a")
        with pytest.raises(Busy, match="of 100 a minute your key has 40 left"):
            await two.admission.charge(41, "a")
        await two.admission.charge(40, "a")
        await two.admission.charge(100, "b")

    asyncio.run(main())


def test_without_the_actor_a_replicas_own_bounds_hold(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        replica = Replica(Fleet(), Limits(max_pending=2, megapixel_steps_per_minute=2100))
        replica.actor.error = ActorDiedError()
        async with replica.admission.permit(2, ""):
            assert not await accepted(replica, 1)
            await replica.admission.charge(2000, "")
            with pytest.raises(Busy, match="left"):
                await replica.admission.charge(101, "")
        await replica.actor.delivered()
        replica.actor.error = None

    asyncio.run(main())
    assert "each ingress replica has its own limits for a moment: ActorDiedError" in caplog.text


def test_a_new_actor_learns_what_a_replica_holds() -> None:
    async def main() -> None:
        limits = Limits(max_pending=10)
        one, two = Replica(Fleet(), limits), Replica(Fleet(), limits)
        async with one.admission.permit(10, ""):
            new = one.actor.fleet = two.actor.fleet = Fleet()
            await one.client.report({"m": 1})
            assert not await accepted(two, 1)
            assert await new.running("another", ["m"]) == 1

    asyncio.run(main())


def test_a_replica_learns_which_requests_to_stop_and_only_once() -> None:
    async def main() -> None:
        fleet = Fleet()
        one, two = Replica(fleet, Limits()), Replica(fleet, Limits())
        assert await one.client.report({"m": 2, "n": 1}) == []
        assert await two.client.report({"m": 1}) == []
        assert await two.client.running(["m"]) == 2
        assert await one.client.running(["m", "n"]) == 1
        await two.client.abort(["m", "o"])
        assert await two.client.report({"m": 1}) == []
        assert await one.client.report({"m": 2, "n": 1}) == ["m"]
        assert await one.client.report({"n": 1}) == []
        assert await two.client.running(["m"]) == 0
        await two.client.abort(["m"])
        assert await one.client.report({"m": 1}) == [], "it began after the order"

    asyncio.run(main())


def test_images_of_jobs_share_the_places_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "WAIT_S", 0.05)
    inside: list[str] = []

    async def image(replica: Replica, name: str, leaves: asyncio.Event) -> None:
        async with replica.client.place("m-decoder", 1):
            inside.append(name)
            await leaves.wait()
            inside.remove(name)

    async def main() -> None:
        fleet = Fleet()
        one, two = Replica(fleet, Limits()), Replica(fleet, Limits())
        leaves = [asyncio.Event() for _ in range(3)]
        first = asyncio.create_task(image(one, "first", leaves[0]))
        await until(lambda: inside == ["first"])
        second = asyncio.create_task(image(two, "second", leaves[1]))
        stopped = asyncio.create_task(image(two, "stopped", leaves[2]))
        await asyncio.sleep(0.2)  # it asks again and again
        assert inside == ["first"]
        async with two.client.place("m-prior", 1):
            pass
        stopped.cancel()
        await asyncio.wait([stopped])
        leaves[0].set()
        await until(lambda: inside == ["second"])
        await two.client.report({})
        assert not await fleet.enter("another", "x", "m-decoder", 1)
        leaves[1].set()
        await asyncio.gather(first, second)
        await two.actor.delivered()
        assert await fleet.enter("another", "x", "m-decoder", 1)

    asyncio.run(main())


def test_the_places_of_a_dead_replica_and_of_a_stopped_image_become_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_module, "WAIT_S", 0.01)

    async def main() -> None:
        fleet = Fleet(lease_s=0.2)
        replica = Replica(fleet, Limits())
        assert await fleet.enter("dead", "x", "m-decoder", 1)
        assert not await fleet.enter("other", "y", "m-decoder", 1)
        async with asyncio.timeout(5):
            while not await fleet.enter("other", "y", "m-decoder", 1):
                pass
        async with replica.client.place("m-decoder", 2):
            # As if it had got the place just when it was stopped, and had left before.
            assert await fleet.enter("other", "z", "m-decoder", 3)
            await fleet.report("other", {}, {}, {"y"})
            assert await fleet.enter("third", "u", "m-decoder", 3)

    asyncio.run(main())


def test_without_the_actor_the_own_gate_suffices() -> None:
    async def main() -> None:
        replica = Replica(Fleet(), Limits())
        replica.actor.error = ActorDiedError()
        async with asyncio.timeout(1), replica.client.place("m-decoder", 1):
            pass
        await replica.actor.delivered()

    asyncio.run(main())
