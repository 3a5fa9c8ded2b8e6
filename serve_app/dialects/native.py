"""The server's own routes: health, status, unloading and result files."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from serve_app.cluster.status import HELPER, ModelStatuses, StageStatus
from serve_app.dialects.openai.schemas import errors
from serve_app.errors import RequestError, stopping

if TYPE_CHECKING:
    from serve_app.cluster.lifecycle import Lifecycle
    from serve_app.config import Limits
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.generation.request import RunningUnit
    from serve_app.observability.gauges import Gauges

RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
"""One range: https://www.rfc-editor.org/rfc/rfc9110#name-range-requests. Several may be ignored, and are."""


class Alive(BaseModel):
    """The answer to a probe."""

    status: Literal["ok"] = "ok"


class Loaded(BaseModel):
    """What is loaded."""

    models: ModelStatuses = Field(description="By model, then by stage.")
    safety_checker: StageStatus | None = Field(default=None, description="If there is one.")
    prompt_expander: StageStatus | None = Field(default=None, description="If there is one of our own.")


class Health(Loaded):
    """How the server is."""

    status: Literal["ok"] = "ok"
    model_loaded: bool = Field(description="Whether any model is.")


class Unit(BaseModel):
    """One image that is being made."""

    request_id: str
    model: str
    stage: Literal["waiting", "prior", "decoder"]
    done: int | None = Field(default=None, description="Tokens drawn or read, or denoising steps made.")
    total: int | None = Field(default=None, description="Of how many.")
    ahead: int | None = Field(default=None, description="While it waits: how many images came before it.")
    seconds: float = Field(description="Its age.")


class Status(BaseModel):
    """What the server is doing."""

    status: Literal["idle", "loading", "generating"]
    queue_length: int = Field(description="Images that wait for a stage.")
    jobs_queued: int = Field(
        description="Jobs that have not begun, whichever ingress is to run them: counted every five seconds, "
        "while the database can be reached."
    )
    units: list[Unit]


class Unloaded(Loaded):
    """What was unloaded."""

    status: Literal["unloaded"] = "unloaded"


class UnloadQuery(BaseModel):
    """What to unload, and what of the requests that are running."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None, description="One model; if unset all of them, safety checker and prompt expander too."
    )
    wait: bool = Field(default=False, description="Wait until no request is running.")
    force: bool = Field(default=False, description="Stop running requests; they get a 503.")


def router(
    generator: Generator, lifecycle: Lifecycle, files: FileStore, gauges: Gauges, limits: Limits
) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    def by_kind(statuses: ModelStatuses) -> dict[str, Any]:
        """As `Loaded` has them."""
        models = {model.name for model in generator.models()}
        return {
            "models": {name: stages for name, stages in statuses.items() if name in models},
            **{
                name.replace(" ", "_"): stages[HELPER]
                for name, stages in statuses.items()
                if name not in models
            },
        }

    @routes.get("/health", response_model_exclude_none=True)
    async def health() -> Health:
        """Whether the server answers, and which models are loaded. Never loads one."""
        kinds = by_kind(await lifecycle.statuses())
        loaded = any(
            all(status["state"] in ("ready", "generating") for status in stages.values())
            for stages in kinds["models"].values()
        )
        return Health(model_loaded=loaded, **kinds)

    @routes.get("/livez")
    async def livez() -> Alive:
        """For probes: the server answers."""
        return Alive()

    @routes.get("/readyz", responses=errors(503))
    async def readyz() -> Alive:
        """For probes: the server takes requests, whether its models are loaded or not."""
        if generator.draining:
            raise stopping()
        return Alive()

    @routes.get("/v1/internal/status", response_model_exclude_none=True)
    async def status() -> Status:
        """What the server is doing: idle, loading or generating, and how far each image is."""
        units = generator.units
        running = [unit for unit in units if unit.progress]
        stages = [stage for model in (await lifecycle.statuses()).values() for stage in model.values()]
        doing: Literal["idle", "loading", "generating"] = "generating" if generator.pending else "idle"
        if not running and any(stage["state"] == "loading" for stage in stages):
            doing = "loading"
        return Status(
            status=doing,
            queue_length=len(units) - len(running),
            jobs_queued=gauges.jobs_queued,
            units=[_describe(unit, units) for unit in units],
        )

    @routes.api_route(
        "/v1/internal/unload",
        methods=["GET", "POST"],
        response_model_exclude_none=True,
        responses=errors(400, 403, 404, 409, 503),
    )
    async def unload(query: Annotated[UnloadQuery, Query()], request: Request) -> Unloaded:
        """Free the GPUs now; the next request loads again. Safe to call twice."""
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            # A browser would even take it for an image's address.
            raise RequestError("Other sites' pages may not unload.", code="cross_site", status=403)
        names = [generator.model(query.model).name] if query.model else lifecycle.names
        await lifecycle.unload(names, wait_s=limits.deadline_s if query.wait else 0, force=query.force)
        statuses = await lifecycle.statuses(fresh=True)
        return Unloaded(**by_kind({name: statuses[name] for name in names}))

    @routes.get(
        "/files/{name}",
        response_class=Response,
        responses={
            200: {"content": _IMAGES, "description": "The file."},
            206: {"content": _IMAGES, "description": "The part of it that `Range` asks for."},
            304: {"description": "It is what `If-None-Match` names."},
            **errors(404, 416),
        },
    )
    async def file(name: str, request: Request) -> Response:
        """A result, by the name in its URL. It never changes."""
        size = await files.size(name)
        if size is None:
            raise _no_file()
        headers = {
            "Accept-Ranges": "bytes",
            "ETag": f'"{name}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-cache",  # to be asked for each time, since it may have been deleted
        }
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        start, end = _range(request, size, headers["ETag"])
        part = (start, end) != (0, size)
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        data = await files.read(name, start, end)
        if data is None:
            raise _no_file()
        suffix = name.rpartition(".")[2]  # nobody has said what was uploaded, and it is never shown
        media_type = "application/octet-stream" if suffix == "upload" else f"image/{suffix}"
        return Response(data, status_code=206 if part else 200, media_type=media_type, headers=headers)

    return routes


def _no_file() -> RequestError:
    return RequestError("There is no such file.", code="not_found", status=404)


_IMAGES: dict[str, Any] = {
    kind: {} for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
}


def _range(request: Request, size: int, etag: str) -> tuple[int, int]:
    """From where to before where the client wants a file of `size` bytes; all of it if that is not clear.

    Raises:
        RequestError: 416, there is nothing there.
    """
    match = RANGE.fullmatch(request.headers.get("range", ""))
    if not match or not any(match.groups()) or request.headers.get("if-range", etag) != etag:
        return 0, size
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise RequestError(
            f"The file has {size} bytes.",
            param="Range",
            status=416,
            headers={"Content-Range": f"bytes */{size}"},
        )
    return (start, end) if start < end else (0, size)


def _describe(unit: RunningUnit, units: list[RunningUnit]) -> Unit:
    described = Unit(
        request_id=unit.request_id,
        model=unit.model,
        stage="waiting",
        seconds=round(time.monotonic() - unit.began, 1),
    )
    if not unit.progress:
        ahead = sum(one.model == unit.model for one in units[: units.index(unit)])
        return described.model_copy(update={"ahead": ahead})
    progress = unit.progress.progress
    return described.model_copy(
        update={"stage": unit.progress.stage, "done": progress.done, "total": progress.total}
    )
