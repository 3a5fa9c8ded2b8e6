"""Source images are decoded in a child process: a fault of a codec ends that process, and nothing else.

The child has images and nothing else of the server: no environment with keys, and no connections. Its answers
are checked and never unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from deployments.observability.log import FAULT
from serve_app.errors import InvalidParameter
from serve_app.generation import codec

if TYPE_CHECKING:
    from deployments.families import Family
    from deployments.types import Pixels

logger = logging.getLogger("ray.serve")

COMMAND = [sys.executable, "-m", "serve_app.generation.decoding"]
TIMEOUT_S = 60.0
"""Seconds after which a decoding is given up. The largest images take about two."""
MAX_LINE_BYTES = 2**16
"""Longest first line of an answer."""


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: its pixels.
        notes: what the client should know about it.
    """

    pixels: Pixels
    notes: list[str]


class DecodingProcess:
    """Decodes one image at a time in a child process, which starts with the first image and after a death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes, family: Family, max_pixels: int, max_side: int) -> Decoded:
        """Decodes an image like `codec.decode_source`. Blocks.

        Raises:
            InvalidParameter: see `codec.decode_source`; or the codec crashes, or takes too long.
        """
        with self._lock:
            deadline = time.monotonic() + TIMEOUT_S
            for _ in range(2):  # the process may have died of something else
                if time.monotonic() > deadline:
                    break
                child = self._running()
                timer = threading.Timer(deadline - time.monotonic(), child.kill)
                timer.start()
                try:
                    pickle.dump((data, family, max_pixels, max_side), _pipe(child.stdin))
                    _pipe(child.stdin).flush()
                    return _answer(_pipe(child.stdout), family.max_side)
                except InvalidParameter:
                    raise
                except Exception as error:  # noqa: BLE001 - a broken process may answer anything
                    self.close()
                    problem = f"{type(error).__name__}, exit status {child.returncode}"
                    logger.warning("the process that decodes images has failed: %s", problem, extra=FAULT)
                finally:
                    timer.cancel()
        raise InvalidParameter("sources", "cannot be decoded; save it anew", code="invalid_image")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child and self._child.poll() is not None:
            self.close()
        if self._child is None:
            path = os.pathsep.join(filter(None, sys.path))
            environment = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(  # noqa: S603 - the command is ours
                COMMAND, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._child

    def close(self) -> None:
        """Ends the child."""
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream  # noqa: S101 - both are pipes
    return stream


def _answer(stream: IO[bytes], max_side: int) -> Decoded:
    """Returns the answer of the child.

    Raises:
        InvalidParameter: the image was rejected.
        ValueError: this is no answer.
    """
    facts = json.loads(stream.readline(MAX_LINE_BYTES))
    if problem := facts.get("problem"):
        raise InvalidParameter("sources", str(problem), code="invalid_image")
    height, width = (int(side) for side in facts["shape"])
    if not (0 < height <= max_side and 0 < width <= max_side):
        raise ValueError("no such image")
    body = stream.read(height * width * 3)
    pixels = np.frombuffer(body, np.uint8).reshape(height, width, 3)
    return Decoded(pixels, [str(note) for note in facts["notes"]])


def main() -> None:
    """Decodes images from the standard input until it is closed."""
    while True:
        try:
            data, family, max_pixels, max_side = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the parent
        except EOFError:
            return
        notes: list[str] = []
        try:
            pixels = codec.decode_source(data, family, max_pixels, max_side, notes.append)
        except InvalidParameter as error:
            answer, body = json.dumps({"problem": error.problem}), b""
        else:
            answer, body = json.dumps({"shape": pixels.shape[:2], "notes": notes}), pixels.tobytes()
        sys.stdout.buffer.write(answer.encode() + b"\n" + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
