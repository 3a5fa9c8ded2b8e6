import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from deployments.config import ModelConfig
from deployments.types import ImageRequest, Pixels, PriorTokens
from serve_app.config import AppConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model
from serve_app.http.services import Services
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound

MakeServices = Callable[..., Services]
Call = Callable[..., httpx.Response]


async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
    yield np.zeros((request.height, request.width, 3), dtype=np.uint8)


@pytest.fixture
def requested() -> list[ImageRequest]:
    """The requests that the prior stage got."""
    return []


@pytest.fixture
def make_services(
    model_config: Callable[..., ModelConfig],
    open_database: Callable[[str], Database],
    tmp_path: Path,
    requested: list[ImageRequest],
) -> MakeServices:
    """Makes the services of a server with one model, over stand-ins for its stages."""

    async def prior(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        requested.append(request)
        yield PriorTokens(target=np.zeros((16, 16), dtype=np.int64))

    def services(
        *,
        description: str | None = None,
        examples: tuple[str, ...] = (),
        storage: dict[str, Any] | None = None,
        lifecycle: Any = None,  # only routes of the status use it
        **config: Any,
    ) -> Services:
        model = model_config().model_copy(update={"description": description, "examples": examples})
        kept = {"url": str(tmp_path / "files"), "min_free_bytes": 0} | (storage or {})
        defaults = {"models": [model.model_dump()], "auth": {"open": True}, "storage": kept}
        settings = AppConfig.model_validate(defaults | config)
        outbound, files = Outbound(settings.outbound), FileStore(settings.storage)
        generator = Generator(
            {"m": Model(config=model, prior=prior, decode=decode)},
            settings.limits,
            SourceReader(outbound, files, settings.limits),
        )
        database = open_database(f"sqlite:///{tmp_path}/jobs.db")
        return Services.of(settings, generator, lifecycle, files, database, outbound)

    return services


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:80")


def scope_of(method: str, path: str, spec_version: str = "2.4") -> dict[str, Any]:
    """Returns the scope of a request, for tests that are the HTTP server themselves."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "server": ("localhost", 80),
        "client": ("there", 1),
        "scheme": "http",
    }


@pytest.fixture
def call() -> Call:
    """Sends one request to an application."""

    def send(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            async with client_of(app) as client:
                return await client.request(method, path, **options)

        return asyncio.run(main())

    return send
