"""Places and shares: bounded for all together and for each key, and given back."""

import asyncio
import time

import pytest

from serve_app.config import Limits
from serve_app.errors import RequestError
from serve_app.generation.admission import Admission


def refused(admission: Admission, units: int, key_id: str = "") -> RequestError:
    with pytest.raises(RequestError) as caught, admission.permit(units, key_id):
        pytest.fail("it was let in")
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    return caught.value


def test_places_are_bounded_and_given_back_however_a_request_ends() -> None:
    admission = Admission(Limits(max_pending=4))
    with admission.permit(3, ""):
        with admission.permit(1, ""):
            assert admission.pending == 4
            refused(admission, 1)
        with pytest.raises(ValueError, match="broken"), admission.permit(1, ""):
            raise ValueError("broken")
        with admission.permit(1, ""):
            pass
    assert admission.pending == 0


def test_when_to_come_back_follows_from_what_recent_images_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(Limits(max_pending=4))
    for _ in range(50):
        with admission.permit(1, ""):
            now += 80
    with admission.permit(4, ""):
        error = refused(admission, 2)
    assert error.headers["Retry-After"] == "40"  # four at a time, 80 s each: one every 20 s


def test_one_key_does_not_take_all_places() -> None:
    admission = Admission(Limits(max_pending=10, max_pending_per_key=4))
    with admission.permit(4, "a"):
        assert refused(admission, 1, "a").message.startswith("Your key has 4 images to make and may have 4")
        with admission.permit(4, "b"):
            assert refused(admission, 3, "c").message.startswith("The server has 8 images")
    with admission.permit(4, "a"):
        pass


def test_the_work_of_a_key_is_bounded_by_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)

    async def main() -> None:
        nonlocal now
        admission = Admission(Limits(megapixel_steps_per_minute=100))
        await admission.charge(59.5, "a")
        with pytest.raises(RequestError) as caught:
            await admission.charge(41, "a")
        assert caught.value.code == "rate_limit_exceeded"
        assert "your key has 40 left" in caught.value.message
        assert 55 <= int(caught.value.headers["Retry-After"]) <= 60
        await admission.charge(40, "a")  # what was refused was not counted
        await admission.charge(100, "b")
        now += int(caught.value.headers["Retry-After"])
        await admission.charge(100, "a")

    asyncio.run(main())


def test_without_a_rate_work_is_not_counted() -> None:
    asyncio.run(Admission(Limits()).charge(1e9, "a"))
