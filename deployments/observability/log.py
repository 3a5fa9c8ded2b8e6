"""Lines of the log that are about one request. Serve writes them as JSON, with their fields, to its files.

There is never a prompt, an image or a key in them.
"""

from __future__ import annotations

import logging
from contextvars import Context
from typing import Any

logger = logging.getLogger("ray.serve")

FAULT = {"event": "fault"}
"""The field of lines that tell of what went wrong and should not have."""


def about(request_id: str, level: int, message: str, **facts: Any) -> None:
    """Write a line.

    Args:
        request_id: of the request; a job's is its own id.
        level: of the line, by `logging`.
        message: for people.
        facts: its fields.
    """
    # Elsewhere Serve would put the id of its own call instead, which for jobs is new every time.
    Context().run(logger.log, level, message, extra={"request_id": request_id, **facts})
