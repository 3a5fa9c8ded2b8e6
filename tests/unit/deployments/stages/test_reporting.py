"""A replica's reports to the demand registry, which no error stops."""

import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from deployments.observability.log import FAULT
from deployments.stages import reporting
from deployments.stages.reporting import Reporter


class Registry:
    """A fake registry.

    Attributes:
        reports: all reports so far.
        fails_once: error of the next report, or None.
    """

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.fails_once: Exception | None = None
        self.report = SimpleNamespace(remote=self._report)

    def _report(self, *report: Any) -> None:
        self.reports.append(report)
        if error := self.fails_once:
            self.fails_once = None
            raise error


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Returns the registry that reporters find, without Ray and without pauses."""
    registry = Registry()
    context = SimpleNamespace(app_name="app", deployment="m-prior", replica_tag="r1")
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    monkeypatch.setattr(reporting, "find_registry", lambda _: registry)
    monkeypatch.setattr("ray.get", lambda result, timeout: result)
    monkeypatch.setattr(reporting, "RENEWAL_S", 0.005)
    monkeypatch.setattr(reporting, "MIN_REPORT_INTERVAL_S", 0)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    return registry


@pytest.fixture
def reporter(registry: Registry) -> Iterator[Reporter]:
    reporter = Reporter()
    yield reporter
    reporter.leave()
    reporter.thread.join(10)
    assert not reporter.thread.is_alive()
    assert registry.reports[-1] == ("m-prior", "r1", None)


def rounds(reporter: Reporter, measure: Callable[[int], None]) -> None:
    """Waits for three rounds, each of which calls `measure` with its number, from 0."""
    done = threading.Event()
    count = 0

    def measured() -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 3:
            done.set()
        measure(count - 1)
        return {"device": "CPU"}

    reporter.measure = measured
    assert done.wait(10)


def test_a_state_is_reported_repeatedly(registry: Registry, reporter: Reporter) -> None:
    reporter.report(lambda: {"state": "ready", "done": len(registry.reports)})
    rounds(reporter, lambda _: None)
    states = [state for *_, state in registry.reports if state]
    assert len(states) >= 2
    assert states[0]["done"] < states[1]["done"]


def test_what_was_measured_is_in_the_next_report(registry: Registry, reporter: Reporter) -> None:
    reporter.report(lambda: {"state": "ready"})
    rounds(reporter, lambda _: None)
    assert registry.reports[-1] == ("m-prior", "r1", {"state": "ready", "device": "CPU"})


def test_an_error_while_measuring_is_logged_and_the_next_round_happens(
    reporter: Reporter, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_once(number: int) -> None:
        if number == 0:
            raise ValueError("broken")

    rounds(reporter, broken_once)
    record = next(record for record in caplog.records if "could not be reported" in record.message)
    assert record.__dict__["event"] == FAULT["event"]
    assert "ValueError: broken" in caplog.text


def test_an_unexpected_error_of_a_report_does_not_end_the_reports(
    registry: Registry, reporter: Reporter, caplog: pytest.LogCaptureFixture
) -> None:
    registry.fails_once = ZeroDivisionError()
    rounds(reporter, lambda _: None)
    assert "ZeroDivisionError" in caplog.text


def test_a_dead_registry_is_searched_again_without_a_log_line(
    registry: Registry, reporter: Reporter, caplog: pytest.LogCaptureFixture
) -> None:
    registry.fails_once = RayError()
    rounds(reporter, lambda _: None)
    assert len(registry.reports) >= 3
    assert not caplog.records
