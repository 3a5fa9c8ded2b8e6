"""Tests of capture and replay of passes, on recording stand-ins for torch's CUDA classes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deployments.families.glm_image.cuda_graphs import MAX_AHEAD, WARM_UP_RUNS, CUDAGraphs

CUDA = torch.device("cuda")


class Recorder:
    """A log of calls as tuples, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.stream = "current"
        self.events = 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    class Stream:
        def __init__(self, name: object = "side") -> None:
            self.name = "current" if name == "current" else "side"

        def wait_stream(self, other: "Stream") -> None:
            recorder.log.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self) -> None:
            recorder.log.append(("replay",))

    class Event:
        def __init__(self, *, blocking: bool = False) -> None:
            self.number = recorder.events
            self.blocking = blocking
            recorder.events += 1

        def record(self) -> None:
            recorder.log.append(("record", self.number))

        def synchronize(self) -> None:
            recorder.log.append(("wait", self.number, self.blocking))

    @contextlib.contextmanager
    def stream(on: Stream) -> Iterator[None]:
        recorder.stream = on.name
        yield
        recorder.stream = "current"

    @contextlib.contextmanager
    def graph(graph: Graph, **options: Any) -> Iterator[None]:
        recorder.log.append(("capture", options))
        recorder.stream = "capturing"
        yield
        recorder.stream = "current"

    for name, stand_in in {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda _: Stream("current"),
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "graph_pool_handle": lambda: "the pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return recorder


def recorded(recorder: Recorder) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        recorder.log.append(("run", recorder.stream))
        return torch.zeros(1)

    return run


def test_a_pass_is_warmed_up_beside_the_current_stream_and_captured(recorder: Recorder) -> None:
    CUDAGraphs(CUDA).capture(recorded(recorder))
    # In the default mode, another thread's work on the device would break the capture.
    capture = ("capture", {"pool": "the pool", "capture_error_mode": "thread_local"})
    assert recorder.log == [
        ("side", "waits for", "current"),
        *[("run", "side")] * WARM_UP_RUNS,
        ("current", "waits for", "side"),
        capture,
        ("run", "capturing"),
    ]


def test_a_replay_runs_no_code_of_the_pass_and_returns_what_was_captured(recorder: Recorder) -> None:
    replay = CUDAGraphs(CUDA).capture(recorded(recorder))
    recorder.log.clear()
    assert replay() is replay()
    assert recorder.log == [("replay",), ("record", 0), ("replay",), ("record", 1)]


def test_the_host_waits_without_spinning_when_two_passes_of_any_graph_are_ahead(recorder: Recorder) -> None:
    graphs = CUDAGraphs(CUDA)
    replays = [graphs.capture(recorded(recorder)) for _ in range(2)]
    recorder.log.clear()
    for i in range(5):
        replays[i % 2]()
    waits = [entry for entry in recorder.log if entry[0] == "wait"]
    assert waits == [("wait", i, True) for i in range(5 - MAX_AHEAD)]
    # The oldest pass has ended before the next one is enqueued.
    assert recorder.log.index(("wait", 0, True)) == 2 * MAX_AHEAD


def test_without_cuda_a_pass_is_compiled_and_then_run_itself(recorder: Recorder) -> None:
    run = recorded(recorder)
    assert CUDAGraphs(torch.device("cpu")).capture(run) is run
    assert recorder.log == [("run", "current")]
