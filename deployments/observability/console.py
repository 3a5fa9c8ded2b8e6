"""Lines on the terminal of `glm-image-server serve`: one an image, a job, a load, a fault.

Replicas are processes of Ray, without a terminal. They send their lines to the command line through a Unix
datagram socket, whose path is in their environment.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ENVIRONMENT = "IMAGE_SERVER_CONSOLE"
"""Environment variable with the socket's path. Unset where no terminal shows the lines."""
MAX_BYTES = 4096


class Console:
    """The terminal's side. It prints the lines that arrive until the process ends.

    Args:
        folder: folder of the socket.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "console"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        os.environ[ENVIRONMENT] = str(path)
        threading.Thread(target=self._print, daemon=True).start()

    def _print(self) -> None:
        while True:
            print(self._socket.recv(MAX_BYTES).decode(errors="replace"), flush=True)


def attach(deployment: str) -> None:
    """Sends the lines of this replica's log that the terminal shows, if one does.

    Args:
        deployment: name of the replica's deployment.
    """
    if path := os.environ.get(ENVIRONMENT):
        logging.getLogger("ray.serve").addHandler(_Sender(path, deployment))


class _Sender(logging.Handler):
    def __init__(self, path: str, deployment: str) -> None:
        super().__init__()
        self._path = path
        self._deployment = deployment
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # a terminal that is stopped must not stop the server

    def emit(self, record: logging.LogRecord) -> None:
        if text := line(record, self._deployment):
            with suppress(OSError):  # the terminal is gone, or too slow
                self._socket.sendto(text.encode()[:MAX_BYTES], self._path)

    def close(self) -> None:
        self._socket.close()
        super().close()


def line(record: logging.LogRecord, deployment: str) -> str | None:
    """Returns the terminal's line for a line of the log; None if the terminal does not show it.

    Args:
        record: the line of the log.
        deployment: name of the deployment that has written it.
    """
    facts = record.__dict__
    match facts.get("event"):
        case "request" if "steps" in facts and "job" not in facts and facts["outcome"] != "rejected":
            text = _images(facts)
        case "request" | "unit":  # further lines say why one has failed
            return None
        case "job":
            text = f"job {facts['job']}, {_images(facts)}"
        case "load" | "unload" if record.levelno == logging.INFO:
            text = f"{deployment} {record.getMessage()}"
        case _ if record.levelno >= logging.WARNING:
            text = f"{record.levelname} {deployment}: {_problem(record)}"
        case _:
            return None
    return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {text}"


def _images(facts: Mapping[str, Any]) -> str:
    """Returns the size, steps, seconds and key of a request or a job, and how it ended if not well."""
    count = f"{facts['n']} × " if facts["n"] > 1 else ""
    width, height = facts["size"]
    parts = [
        f"{facts['model']}: {count}{width}x{height}",
        f"{facts['steps']} steps",
        f"{facts['seconds']:.1f} s",
        *([f"key {facts['key_id']}"] if facts.get("key_id") else []),
        *([str(facts["outcome"])] if facts["outcome"] != "succeeded" else []),
        *([str(facts["error"])] if facts.get("error") else []),
    ]
    return ", ".join(parts)


def _problem(record: logging.LogRecord) -> str:
    """Returns the first and the last line of a problem. A traceback ends with the error."""
    lines = record.getMessage().strip().splitlines() or [""]
    if record.exc_info and record.exc_info[1]:
        lines += traceback.format_exception_only(record.exc_info[1])[-1].strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0].removesuffix(':')}: {lines[-1]}"
