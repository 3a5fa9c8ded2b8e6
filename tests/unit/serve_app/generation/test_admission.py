"""Places and rates: bounded in total and for each API key, and released."""

import asyncio
import time

import pytest

from serve_app.config import Limits
from serve_app.errors import Busy
from serve_app.generation.admission import Admission


async def rejected(admission: Admission, units: int, key_id: str = "") -> Busy:
    with pytest.raises(Busy) as caught:
        async with admission.permit(units, key_id):
            pytest.fail("it was accepted")
    assert caught.value.retryable
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    return caught.value


def test_places_are_bounded_and_released_however_a_request_ends() -> None:
    async def main() -> None:
        admission = Admission(Limits(max_pending=4))
        async with admission.permit(3, ""):
            async with admission.permit(1, ""):
                assert admission.pending == 4
                await rejected(admission, 1)
            with pytest.raises(ValueError, match="broken"):
                async with admission.permit(1, ""):
                    raise ValueError("broken")
            async with admission.permit(1, ""):
                pass
        assert admission.pending == 0

    asyncio.run(main())


def test_the_time_of_the_retry_follows_from_the_durations_of_recent_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def main() -> None:
        nonlocal now
        admission = Admission(Limits(max_pending=4))
        for _ in range(50):
            async with admission.permit(1, ""):
                now += 80
        async with admission.permit(4, ""):
            error = await rejected(admission, 2)
        assert error.retry_after_s == 40  # four at a time, 80 s each: one every 20 s

    asyncio.run(main())


def test_one_key_cannot_take_all_places() -> None:
    async def main() -> None:
        admission = Admission(Limits(max_pending=10, max_pending_per_key=4))
        async with admission.permit(4, "a"):
            error = await rejected(admission, 1, "a")
            assert error.message.startswith("Your key has 4 images to make and may have 4")
            async with admission.permit(4, "b"):
                error = await rejected(admission, 3, "c")
                assert error.message.startswith("The server has 8 images")
        async with admission.permit(4, "a"):
            pass

    asyncio.run(main())


def test_the_work_of_a_key_is_bounded_by_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)

    async def main() -> None:
        nonlocal now
        admission = Admission(Limits(megapixel_steps_per_minute=100))
        await admission.charge(59.5, "a")
        with pytest.raises(Busy) as caught:
            await admission.charge(41, "a")
        wait_s = caught.value.retry_after_s
        assert caught.value.code == "rate_limit_exceeded"
        assert "your key has 40 left" in caught.value.message
        assert wait_s is not None
        assert 55 <= wait_s <= 60
        await admission.charge(40, "a")  # the rejected work was not counted
        await admission.charge(100, "b")
        now += wait_s
        await admission.charge(100, "a")

    asyncio.run(main())


def test_without_a_rate_work_is_not_counted() -> None:
    asyncio.run(Admission(Limits()).charge(1e9, "a"))
