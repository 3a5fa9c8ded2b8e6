"""The server's own routes: health, status, unloading and result files."""

from __future__ import annotations

import mimetypes
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from serve_app.errors import RequestError

if TYPE_CHECKING:
    from serve_app.config import Limits
    from serve_app.generation import Generator, RunningUnit
    from serve_app.lifecycle import Lifecycle
    from serve_app.storage import FileStore


class UnloadQuery(BaseModel):
    """What to unload, and what of the requests that are running."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, description="One model; all of them if unset.")
    wait: bool = Field(default=False, description="Wait until no request is running.")
    force: bool = Field(default=False, description="Stop running requests; they get a 503.")


def router(generator: Generator, lifecycle: Lifecycle, files: FileStore, limits: Limits) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        """Whether the server answers, and which models are loaded. Never loads one."""
        models = await lifecycle.statuses()
        return {
            "status": "ok",
            "model_loaded": any(
                all(status["state"] in ("ready", "generating") for status in stages.values())
                for stages in models.values()
            ),
            "models": models,
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
        running = [unit for unit in units if unit.progress]
        stages = [stage for model in (await lifecycle.statuses()).values() for stage in model.values()]
        if not running and any(stage["state"] == "loading" for stage in stages):
            doing = "loading"
        else:
            doing = "generating" if units else "idle"
        return {
            "status": doing,
            "queue_length": generator.pending - len(running),
            "units": [_describe(unit, units) for unit in units],
        }

    @routes.api_route("/v1/internal/unload", methods=["GET", "POST"])
    async def unload(query: Annotated[UnloadQuery, Query()]) -> dict[str, Any]:
        """Free the GPUs now; the next request loads again. Safe to call twice."""
        if query.wait and query.force:
            raise RequestError("wait and force exclude each other.", param="wait")
        models = [one.name for one in ([generator.model(query.model)] if query.model else generator.models())]
        await lifecycle.unload(models, wait_s=limits.deadline_s if query.wait else 0, force=query.force)
        statuses = await lifecycle.statuses(fresh=True)
        return {"status": "unloaded", "models": {model: statuses[model] for model in models}}

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


def _describe(unit: RunningUnit, units: list[RunningUnit]) -> dict[str, Any]:
    described: dict[str, Any] = {"request_id": unit.request_id, "model": unit.model}
    if unit.progress:
        progress = unit.progress.progress
        described |= {"stage": unit.progress.stage, "done": progress.done, "total": progress.total}
    else:
        ahead = sum(one.model == unit.model for one in units[: units.index(unit)])
        described |= {"stage": "waiting", "ahead": ahead}
    return described | {"seconds": round(time.monotonic() - unit.began, 1)}
