"""The terminal's lines: which lines of the log it shows, in which words, and how they arrive."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.observability import console
from deployments.observability.log import FAULT
from tests.polling import until

IMAGE = {"event": "request", "model": "glm-image", "size": (512, 512), "n": 1, "steps": 8, "seconds": 9.06}


def shown(level: int, message: str, **facts: Any) -> str | None:
    record = logging.LogRecord("ray.serve", level, "", 0, message, (), None)
    record.__dict__.update(facts)
    line = console.line(record, "glm-image-prior")
    return line and re.sub(r"^\d\d:\d\d:\d\d ", "", line)


def test_an_image_has_a_line() -> None:
    line = shown(logging.INFO, "POST", **IMAGE, outcome="succeeded", key_id="")
    assert line == "glm-image: 512x512, 8 steps, 9.1 s"


def test_images_that_have_failed_say_why() -> None:
    facts = IMAGE | {"n": 3, "outcome": "failed", "error": "out_of_memory", "key_id": "alice"}
    line = shown(logging.ERROR, "POST", **facts)
    assert line == "glm-image: 3 × 512x512, 8 steps, 9.1 s, key alice, failed, out_of_memory"


def test_a_job_has_a_line_when_it_ends_and_none_when_it_is_submitted() -> None:
    job = IMAGE | {"event": "job", "job": "1f", "outcome": "cancelled", "error": None, "key_id": ""}
    assert shown(logging.INFO, "job", **job) == "job 1f, glm-image: 512x512, 8 steps, 9.1 s, cancelled"
    submitted = IMAGE | {"job": "1f", "outcome": "succeeded", "key_id": ""}
    assert shown(logging.INFO, "POST", **submitted) is None


def test_a_load_names_its_stage() -> None:
    assert shown(logging.INFO, "loaded in 3.100 s", event="load") == "glm-image-prior loaded in 3.100 s"
    assert shown(logging.INFO, "unloaded", event="unload") == "glm-image-prior unloaded"


def test_a_fault_has_its_first_and_its_last_line() -> None:
    trace = "loading failed: Traceback:\n  File …\nCheckpointError: no folder\n"
    line = shown(logging.ERROR, trace, **FAULT | {"event": "load"})
    assert line == "ERROR glm-image-prior: loading failed: Traceback: CheckpointError: no folder"
    error = OSError("disk full")
    line = shown(logging.ERROR, "a file could not be written", exc_info=(OSError, error, None), **FAULT)
    assert line == "ERROR glm-image-prior: a file could not be written: OSError: disk full"


@pytest.mark.parametrize(
    ("level", "facts"),
    [
        (logging.INFO, {"event": "request", "status": 200, "outcome": "succeeded"}),
        (logging.WARNING, IMAGE | {"outcome": "rejected"}),
        (logging.WARNING, {"event": "unit", "outcome": "ReplicaDied"}),
        (logging.INFO, {}),
    ],
)
def test_other_lines_are_not_shown(level: int, facts: dict[str, Any]) -> None:
    assert shown(level, "a line", **facts) is None


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    monkeypatch.setenv(console.ENVIRONMENT, "")  # restored afterwards
    logger = logging.getLogger("ray.serve")
    before = list(logger.handlers)
    console.Console(tmp_path)
    console.attach("glm-image-prior")
    yield logger
    (sender,) = set(logger.handlers) - set(before)
    logger.removeHandler(sender)
    sender.close()


def test_lines_arrive_on_the_terminal(replica: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    printed = ""

    def has_arrived() -> bool:
        nonlocal printed
        printed += capsys.readouterr().out
        return printed.endswith("glm-image-prior loaded in 3 s\n")

    replica.warning("loaded in 3 s", extra={"event": "unit"})
    replica.setLevel(logging.INFO)
    replica.info("loaded in 3 s", extra={"event": "load"})
    until(has_arrived)
    assert len(printed.splitlines()) == 1


def test_a_closed_terminal_disturbs_no_replica(replica: logging.Logger) -> None:
    Path(os.environ[console.ENVIRONMENT]).unlink()
    replica.error("the terminal is gone", extra=FAULT)


def test_without_a_terminal_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(console.ENVIRONMENT, raising=False)
    before = list(logging.getLogger("ray.serve").handlers)
    console.attach("glm-image-prior")
    assert logging.getLogger("ray.serve").handlers == before
