"""A line of the log for every request, with all that explains it but what was asked for.

Serve writes it as JSON to its own files and, without the fields, to the terminal. There is never a prompt, an
image, a key or a path in it: of a path its route, of a key its id.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from deployments.config import ModelConfig
    from serve_app.generation import GeneratedImage, Generation

logger = logging.getLogger("ray.serve")

PROBES = ("/health", "/livez", "/readyz", "/v1/internal/status")
"""Asked every few seconds: logged for who wants to see all."""


def note_generation(request: Request, generation: Generation, model: ModelConfig) -> None:
    """Have the request's line say what is made, and by which model."""
    defaults = model.defaults
    request.state.log |= {
        "model": model.name,
        "size": generation.size or (defaults.width, defaults.height),
        "n": generation.n,
        "steps": defaults.steps if generation.steps is None else generation.steps,
        "sources": len(generation.sources),
    }


def note_images(request: Request, made: list[GeneratedImage]) -> None:
    """Have it say, too, how long each stage took: of several images, the longest times."""
    for name in ("waiting_s", "prior_s", "decoder_s"):
        request.state.log[name] = round(max(getattr(image, name) for image in made), 3)


def note_error(request: Request, code: str) -> None:
    """Have it say what went wrong, which a stream's status does not."""
    request.state.log["error"] = code


class RequestLog:
    """Writes the lines."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, method = time.monotonic(), scope["method"]
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = facts
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "no route")
            seconds = time.monotonic() - began
            facts |= {
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 3),
                "key_id": scope["state"].get("key_id", ""),
            }
            level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
            logger.log(
                level,
                "%s %s %s in %.3f s",
                method,
                route,
                status or "unanswered",
                seconds,
                extra=facts,
            )
