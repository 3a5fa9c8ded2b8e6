"""Engines survive an error, free what it has left, and stop for good when their device is lost."""

import logging
import weakref

import pytest
import torch

from deployments.engines.guard import guarded
from deployments.errors import Cancelled, EngineFault, OutOfMemoryError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Engine:
    fault: EngineFault | None = None


def test_an_error_is_logged_and_raised_and_the_engine_recovers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    engine, recovered = Engine(), list[int]()
    with (
        pytest.raises(ValueError, match="broken"),
        guarded(engine, CPU, "the engine", request_id="r1", recover=lambda: recovered.append(0)),
    ):
        raise ValueError("broken")
    assert engine.fault is None
    assert recovered
    record = caplog.records[0]
    assert record.message.startswith("the engine failed: Traceback")
    assert record.__dict__["request_id"] == "r1"


def test_a_cancelled_call_is_not_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with pytest.raises(Cancelled), guarded(Engine(), CPU, "the engine", request_id=""):
        raise Cancelled
    assert not caplog.records


def test_without_an_error_nothing_happens() -> None:
    recovered: list[int] = []
    with guarded(Engine(), CPU, "the engine", request_id="", recover=lambda: recovered.append(0)):
        pass
    assert not recovered


def test_too_little_memory_has_its_message() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^choose a smaller size$"),
        guarded(Engine(), CPU, "the engine", request_id="", too_large="choose a smaller size"),
    ):
        raise torch.OutOfMemoryError
    with (
        pytest.raises(OutOfMemoryError, match="the engine has too little memory for this request: 2 GB more"),
        guarded(Engine(), CPU, "the engine", request_id=""),
    ):
        raise torch.OutOfMemoryError("2 GB more")


def test_the_blocks_tensors_are_gone_before_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    at_synchronize: list[torch.Tensor | None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: at_synchronize.append(kept[0]()))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def fail() -> None:
        tensor = torch.zeros(1)
        kept.append(weakref.ref(tensor))
        raise ValueError("broken")

    def run() -> None:
        with guarded(Engine(), GPU, "the engine", request_id=""):
            fail()

    with pytest.raises(ValueError, match="broken") as raised:
        run()
    assert at_synchronize == [None]  # their frames are gone
    assert raised.value.__traceback__  # the error is kept, as in a future
    assert kept[0]() is None


def test_a_lost_device_is_a_fault_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    engine, recovered = Engine(), list[int]()
    with (
        pytest.raises(ValueError, match="broken"),
        guarded(engine, GPU, "the engine", request_id="", recover=lambda: recovered.append(0)),
    ):
        raise ValueError("broken")
    assert not recovered
    with (
        pytest.raises(EngineFault, match="the engine stopped: device lost"),
        guarded(engine, GPU, "the engine", request_id=""),
    ):
        raise AssertionError("the block must not run")
