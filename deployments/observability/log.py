"""Log lines about one request. Serve writes them, with their fields, as JSON to its log files.

They never contain a prompt, an image or a key.
"""

from __future__ import annotations

import logging
from contextvars import Context
from typing import Any

logger = logging.getLogger("ray.serve")

FAULT = {"event": "fault"}
"""Field of the log lines about an unexpected failure."""


def about(request_id: str, level: int, message: str, **facts: Any) -> None:
    """Writes a log line about a request.

    Args:
        request_id: id of the request; a job's request has the job's id.
        level: level of the line, by `logging`.
        message: text for people.
        facts: more fields of the line.
    """
    # In the current context Serve would write its own call's id, which is a new one for each call of a job.
    Context().run(logger.log, level, message, extra={"request_id": request_id, **facts})
