"""The server's own routes: health, status, unloading and files."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from serve_app import __version__
from serve_app.cluster.status import HELPER, ModelStatuses, StageStatus
from serve_app.config import Role
from serve_app.dialects.openai.schemas import errors
from serve_app.errors import NotFound, stopping
from serve_app.http.auth import require_operator
from serve_app.http.errors import ProtocolError

if TYPE_CHECKING:
    from serve_app.generation.unit import Unit
    from serve_app.http.services import Services

RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
"""One range: https://www.rfc-editor.org/rfc/rfc9110#name-range-requests. Requests for several are ignored."""


class Alive(BaseModel):
    """The answer to a probe."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Versions of the server and of its main packages."""

    version: str = Field(description="Version of this server.")
    ray: str
    torch: str = Field(description="On the machine of the ingress, as those of the other packages.")
    diffusers: str
    transformers: str


class Loaded(BaseModel):
    """States of the stages."""

    models: ModelStatuses = Field(description="States by model, then by stage.")
    safety_checker: StageStatus | None = Field(default=None, description="Set if there is one.")
    prompt_expander: StageStatus | None = Field(
        default=None, description="Set if it is a model of this server."
    )


class Health(Loaded):
    """Health of the server."""

    status: Literal["ok"] = "ok"
    version: str = Field(default=__version__, description="Version of this server.")
    model_loaded: bool = Field(description="Whether any model is loaded.")
    failing: list[str] | None = Field(
        default=None, description="Background tasks that keep failing. See the log."
    )


class UnitStatus(BaseModel):
    """An image in the making."""

    request_id: str
    model: str
    stage: Literal["waiting", "prior", "decoder"]
    done: int | None = Field(default=None, description="Tokens generated or read, or denoising steps.")
    total: int | None = Field(default=None, description="Number of tokens or steps in all.")
    ahead: int | None = Field(
        default=None, description="While it waits: number of images of its model before it."
    )
    seconds: float = Field(description="Seconds since its start.")


class Status(BaseModel):
    """Activity of the server."""

    role: Role = Field(description="Role of the key that asks. Without a key it is `operator`.")
    status: Literal["idle", "loading", "generating"]
    queue_length: int = Field(description="Images that wait for a stage.")
    jobs_queued: int = Field(
        description="Queued jobs of all ingress replicas, counted every five seconds while the database can "
        "be reached."
    )
    jobs_foreign: dict[str, int] | None = Field(
        default=None,
        description="Numbers of those that no model here can make, by the `identity` of the model that they "
        "wait for.",
    )
    units: list[UnitStatus]


class Unloaded(Loaded):
    """States after an unload."""

    status: Literal["unloaded"] = "unloaded"


class UnloadQuery(BaseModel):
    """Selection of models, and what happens to their running requests."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None, description="One model. Unset, all models, the safety checker and the prompt expander."
    )
    wait: bool = Field(default=False, description="Wait until no request is running.")
    force: bool = Field(default=False, description="Abort running requests; they get a 503.")


def router(services: Services) -> APIRouter:
    """Returns the server's own routes."""
    routes = APIRouter(tags=["Server"])
    _add_health(routes, services)
    _add_status(routes, services)
    _add_unload(routes, services)
    _add_files(routes, services)
    return routes


def by_kind(services: Services, statuses: ModelStatuses) -> dict[str, Any]:
    """Returns states in the form of `Loaded`."""
    models = {model.name for model in services.generator.models()}
    helpers = {
        name.replace(" ", "_"): stages[HELPER] for name, stages in statuses.items() if name not in models
    }
    return {"models": {name: stages for name, stages in statuses.items() if name in models}} | helpers


def _add_health(routes: APIRouter, services: Services) -> None:
    @routes.get("/health", response_model_exclude_none=True)
    async def health() -> Health:
        """Returns whether the server works, and which models are loaded. Loads no model."""
        kinds = by_kind(services, await services.lifecycle.statuses())
        loaded = any(
            all(status["state"] in ("ready", "generating") for status in stages.values())
            for stages in kinds["models"].values()
        )
        return Health(model_loaded=loaded, failing=services.background.failing or None, **kinds)

    @routes.get("/version")
    def version() -> Version:
        """Returns the versions of the server and of its main packages."""
        return _versions()

    @routes.get("/livez")
    async def livez() -> Alive:
        """Answers a probe: the server is alive."""
        return Alive()

    @routes.get("/readyz", responses=errors(503))
    async def readyz() -> Alive:
        """Answers a probe: the server takes requests, whether its models are loaded or not."""
        if services.generator.draining:
            raise stopping()
        return Alive()


@functools.cache
def _versions() -> Version:
    """Returns the installed versions, read from the packages' metadata: this plane loads no torch."""
    packages = ("ray", "torch", "diffusers", "transformers")
    return Version(version=__version__, **{name: importlib.metadata.version(name) for name in packages})


def _add_status(routes: APIRouter, services: Services) -> None:
    generator = services.generator

    @routes.get("/v1/internal/status", response_model_exclude_none=True)
    async def status(request: Request) -> Status:
        """Returns whether the server is idle, loading or generating, and the progress of each image."""
        units = generator.units
        running = [unit for unit in units if unit.progress]
        stages = [
            stage for model in (await services.lifecycle.statuses()).values() for stage in model.values()
        ]
        doing: Literal["idle", "loading", "generating"] = "generating" if generator.running.units else "idle"
        if not running and any(stage["state"] == "loading" for stage in stages):
            doing = "loading"
        return Status(
            role="operator" if request.state.is_operator else "user",
            status=doing,
            queue_length=len(units) - len(running),
            jobs_queued=services.gauges.jobs_queued,
            jobs_foreign=dict(services.gauges.jobs_foreign) or None,
            units=[_describe(unit, units) for unit in units],
        )


def _add_unload(routes: APIRouter, services: Services) -> None:
    lifecycle = services.lifecycle

    @routes.api_route(
        "/v1/internal/unload",
        methods=["GET", "POST"],
        dependencies=[Depends(require_operator)],
        response_model_exclude_none=True,
        responses=errors(400, 403, 404, 409, 503),
    )
    async def unload(query: Annotated[UnloadQuery, Query()]) -> Unloaded:
        """Frees the GPUs now. The next request loads again. A second call does nothing.

        Needs a key with the role `operator`.
        """
        names = [services.generator.model(query.model).name] if query.model else lifecycle.names
        wait_s = services.config.limits.deadline_s if query.wait else 0
        await lifecycle.unload(names, wait_s=wait_s, force=query.force)
        statuses = await lifecycle.statuses(fresh=True)
        return Unloaded(**by_kind(services, {name: statuses[name] for name in names}))


def _add_files(routes: APIRouter, services: Services) -> None:
    files = services.files

    @routes.get(
        "/files/{name}",
        response_class=Response,
        responses={
            200: {"content": _IMAGES, "description": "The file."},
            206: {"content": _IMAGES, "description": "The part of the file that `Range` asks for."},
            304: {"description": "The file is the one that `If-None-Match` names."},
            **errors(404, 416),
        },
    )
    async def file(name: str, request: Request) -> Response:
        """Returns a file by the name in its URL. Files never change."""
        size = await files.size(name)
        if size is None:
            raise _no_file()
        headers = {
            "Accept-Ranges": "bytes",
            "ETag": f'"{name}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, no-cache",  # to be validated each time, since it may have been deleted
        }
        known = request.headers.get("if-none-match", "")
        if any(tag.strip().removeprefix("W/") in (headers["ETag"], "*") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        start, end = _range(request, size, headers["ETag"])
        part = (start, end) != (0, size)
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        data = await files.read(name, start, end)
        if data is None:
            raise _no_file()
        suffix = name.rpartition(".")[2]  # the format of an upload is unknown, and it is never displayed
        media_type = "application/octet-stream" if suffix == "upload" else f"image/{suffix}"
        return Response(data, status_code=206 if part else 200, media_type=media_type, headers=headers)


def _no_file() -> NotFound:
    return NotFound("There is no such file. It may have expired, or its job was deleted.")


_IMAGES: dict[str, Any] = {
    kind: {} for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
}


def _range(request: Request, size: int, etag: str) -> tuple[int, int]:
    """Returns the start and the end of the requested range; of the whole file, if the header is not clear.

    Raises:
        ProtocolError: 416, the range is outside of the file.
    """
    match = RANGE.fullmatch(request.headers.get("range", ""))
    if not match or not any(match.groups()) or request.headers.get("if-range", etag) != etag:
        return 0, size
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise ProtocolError(
            f"The range {match[0]} begins behind the end of the file, which has {size} bytes.",
            param="Range",
            code="invalid_value",
            status=416,
            headers={"Content-Range": f"bytes */{size}"},
        )
    return (start, end) if start < end else (0, size)


def _describe(unit: Unit, units: list[Unit]) -> UnitStatus:
    described = UnitStatus(
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
