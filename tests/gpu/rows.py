"""The rows that a step of the window writes: one JSON object per line, written immediately."""

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
"""Maximum length of a row's error message. The log has the traceback."""


@dataclass(kw_only=True)
class Rows:
    """Writes rows to a file and to a stream, without buffers.

    Attributes:
        out: folder of the file.
        began: start of the window, by `time.monotonic`, whose clock all processes share.
        stream: descriptor of the stream.
    """

    out: Path
    began: float
    stream: int = 1

    def write(self, **values: Any) -> None:
        """Writes one row, first to the file, because the stream may be closed."""
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
        """Returns all rows of the file, including those of earlier processes."""
        file = self.out / FIGURES
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(kw_only=True)
class Run:
    """One step of the window, in its process.

    Attributes:
        step: name of the step.
        rows: writer of its figures.
        device: `cuda` or `cpu`.
        tiny: whether models and images are tiny, for trying the script.
        compiled: whether code is compiled. Tiny runs skip this to save minutes.
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
        """True if the step runs on a GPU."""
        return self.device == "cuda"

    def emit(self, figure: str, **values: Any) -> None:
        """Writes a row with one figure."""
        self.rows.write(step=self.step, figure=figure, **values)

    @contextmanager
    def figure(self, name: str, **values: Any) -> Iterator[dict[str, Any]]:
        """Measures one figure. An error becomes part of its row, and other figures continue.

        Args:
            name: name of the figure.
            values: fields of the row. The block adds more to the dictionary that it receives.
        """
        try:
            yield values
        except Exception as error:  # noqa: BLE001 - the other figures continue
            traceback.print_exc()
            values["error"] = f"{type(error).__name__}: {error}"[:ERROR_CHARS]
            _release(error)
        self.emit(name, **values)

    def needs_gpu(self, figure: str) -> bool:
        """Returns whether the figure needs a GPU that this step does not have, and writes a row if so."""
        if not self.on_gpu:
            self.emit(figure, skipped=NEEDS_GPU)
        return not self.on_gpu

    def size(self, pixels: int) -> int:
        """Returns the side of an image, divided by four in tiny runs."""
        return pixels // 4 if self.tiny else pixels

    def count(self, number: int, tiny: int) -> int:
        """Returns a number of steps or repetitions, with another number in tiny runs."""
        return tiny if self.tiny else number


def _plain(value: Any) -> Any:
    """Returns a value for JSON. Numbers are rounded to four digits, and NaN and infinity become null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _release(error: BaseException) -> None:
    """Releases the device memory that the frames of an error hold."""
    while True:
        error.__traceback__ = None
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error = following
    if torch := sys.modules.get("torch"):
        with suppress(Exception):  # a device that is lost raises here too
            torch.cuda.empty_cache()
