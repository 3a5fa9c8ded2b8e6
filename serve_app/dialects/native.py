"""The server's own routes: health and result files."""

from __future__ import annotations

import mimetypes
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serve_app.status import ModelStates
    from serve_app.storage import FileStore


def router(files: FileStore, states: Callable[[], Awaitable[ModelStates]]) -> APIRouter:
    """The routes; `states` tells each model's stages' states without waking any."""
    routes = APIRouter()

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        """Whether the server answers, and which models are loaded. Never loads one."""
        models = await states()
        return {
            "status": "ok",
            "model_loaded": any(set(stages.values()) == {"ready"} for stages in models.values()),
            "models": models,
        }

    @routes.api_route("/files/{name}", methods=["GET", "HEAD"], response_class=Response)
    async def file(name: str) -> Response:
        """A result, by the name in its URL."""
        data = await files.read(name)
        if data is None:
            raise RequestError("There is no such file.", code="not_found", status=404)
        return Response(
            data, media_type=mimetypes.guess_type(name)[0], headers={"X-Content-Type-Options": "nosniff"}
        )

    return routes
