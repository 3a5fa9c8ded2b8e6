"""The rows that a step of the window writes: one JSON object a line, each written as soon as it is known."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

FIGURES = "figures.jsonl"
NEEDS_GPU = "needs a GPU"
ERROR_CHARS = 400
"""Longest error message of a row. The log has the traceback."""


@dataclass(kw_only=True)
class Rows:
    """Writes rows to a file and to a stream, both without a buffer.

    Attributes:
        out: folder of the file.
        began: when the window began, on the clock of `time.monotonic`, which all processes share.
        stream: descriptor of the stream.
    """

    out: Path
    began: float
    stream: int = 1

    def write(self, **values: Any) -> None:
        """Writes one row.

        The file comes first. A reader of the stream may have gone.
        """
        row = {name: _plain(value) for name, value in values.items()}
        row["at_s"] = round(time.monotonic() - self.began, 1)
        line = json.dumps(row).encode() + b"\n"
        file = os.open(self.out / FIGURES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, line)
        finally:
            os.close(file)
        with suppress(OSError):
            os.write(self.stream, line)

    def read(self) -> list[dict[str, Any]]:
        """Returns all rows of the file, those of earlier processes included."""
        file = self.out / FIGURES
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(kw_only=True)
class Run:
    """One step of the window, as its process sees it.

    Attributes:
        step: name of the step.
        rows: where its figures go.
        device: `cuda` or `cpu`.
        tiny: whether models and images are tiny, to try the script.
        compiled: whether code is compiled. Tiny runs leave it out to save minutes.
        limit_s: seconds until the step is stopped.
    """

    step: str
    rows: Rows
    device: str = "cuda"
    tiny: bool = False
    compiled: bool = True
    limit_s: float = 600

    @property
    def on_gpu(self) -> bool:
        """Whether the step runs on a GPU."""
        return self.device == "cuda"

    def emit(self, figure: str, **values: Any) -> None:
        """Writes a row with one figure."""
        self.rows.write(step=self.step, figure=figure, **values)

    @contextmanager
    def figure(self, name: str, **values: Any) -> Iterator[dict[str, Any]]:
        """Measures one figure. An error costs this figure alone and becomes part of its row.

        Args:
            name: of the figure.
            values: fields of the row. The block adds more to the dictionary that it gets.
        """
        try:
            yield values
        except Exception as error:  # noqa: BLE001 - the other figures go on
            traceback.print_exc()
            values["error"] = f"{type(error).__name__}: {error}"[:ERROR_CHARS]
            _let_go(error)
        self.emit(name, **values)

    def needs_gpu(self, figure: str) -> bool:
        """Returns whether the figure cannot be had on this device, and writes so."""
        if not self.on_gpu:
            self.emit(figure, skipped=NEEDS_GPU)
        return not self.on_gpu

    def size(self, pixels: int) -> int:
        """Returns the side of an image, a quarter of it in tiny runs."""
        return pixels // 4 if self.tiny else pixels

    def count(self, number: int, tiny: int) -> int:
        """Returns a number of steps or repetitions, or the other number in tiny runs."""
        return tiny if self.tiny else number


def _plain(value: Any) -> Any:
    """Returns a value for JSON. Four digits of a number are enough; what is no number becomes null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _let_go(error: BaseException) -> None:
    """Frees what the frames of an error hold on the device."""
    while True:
        error.__traceback__ = None
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error = following
    if torch := sys.modules.get("torch"):
        with suppress(Exception):  # a device that is lost raises here too
            torch.cuda.empty_cache()
