"""The server's own routes: health, status and result files."""

from __future__ import annotations

import mimetypes
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serve_app.generation import Generator, RunningUnit
    from serve_app.status import ModelStates
    from serve_app.storage import FileStore


def router(generator: Generator, files: FileStore, states: Callable[[], Awaitable[ModelStates]]) -> APIRouter:
    """The routes; `states` tells each model's stages' states without waking any."""
    routes = APIRouter()

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        """Whether the server answers, and which models are loaded. Never loads one."""
        models = await states()
        busy = {(unit.model, unit.progress.stage) for unit in generator.units if unit.progress}
        return {
            "status": "ok",
            "model_loaded": any(set(stages.values()) == {"ready"} for stages in models.values()),
            "models": {
                model: {
                    stage: "generating" if state == "ready" and (model, stage) in busy else state
                    for stage, state in stages.items()
                }
                for model, stages in models.items()
            },
        }

    @routes.api_route("/livez", methods=["GET", "HEAD"])
    @routes.api_route("/readyz", methods=["GET", "HEAD"])
    async def probe() -> dict[str, str]:
        """For probes: the server answers, and takes requests, whether its models are loaded or not."""
        return {"status": "ok"}

    @routes.api_route("/v1/internal/status", methods=["GET", "HEAD"])
    async def status() -> dict[str, Any]:
        """What the server is doing: idle, loading or generating, and how far each image is."""
        units = generator.units
        loading = any("loading" in stages.values() for stages in (await states()).values())
        return {
            "status": "generating" if units else "loading" if loading else "idle",
            "units": [_describe(unit) for unit in units],
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


def _describe(unit: RunningUnit) -> dict[str, Any]:
    described: dict[str, Any] = {"model": unit.model, "stage": "waiting"}
    if unit.progress:
        progress = unit.progress.progress
        described |= {"stage": unit.progress.stage, "done": progress.done, "total": progress.total}
    return described | {"seconds": round(time.monotonic() - unit.began, 1)}
