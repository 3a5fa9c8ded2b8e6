"""The HTTP application: every dialect's routes, who may come in, one place for errors, bounds on bodies."""

from __future__ import annotations

import asyncio
import functools
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import yaml
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from deployments.observability import tracing
from serve_app import playground
from serve_app.dialects import native, pixazo, zai
from serve_app.dialects.fal import routes as fal
from serve_app.dialects.openai import jobs
from serve_app.dialects.openai import routes as openai
from serve_app.dialects.openai.parse import RequestReader
from serve_app.errors import (
    InvalidParameter,
    RequestError,
    server_error,
    too_large,
    too_much_at_once,
    too_slow,
)
from serve_app.files.uploads import Uploads
from serve_app.generation.delivery import Delivery
from serve_app.generation.sources import SourceReader
from serve_app.http.auth import Authentication, Keys
from serve_app.http.links import Links
from serve_app.http.openapi import describe
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.signing import Signer
from serve_app.jobs.store import JobStore
from serve_app.jobs.webhooks import Webhooks
from serve_app.observability import telemetry
from serve_app.observability.gauges import Gauges

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve_app.cluster.lifecycle import Lifecycle
    from serve_app.config import AppConfig, Limits
    from serve_app.files.store import FileStore
    from serve_app.generation.generator import Generator
    from serve_app.jobs.database import Database
    from serve_app.outbound import Outbound


ENVELOPES = {
    fal.PATHS: fal.error_response,
    zai.PATHS: zai.error_response,
    pixazo.NESTED_PATHS: pixazo.nested_error_response,
    pixazo.FLAT_PATHS: pixazo.flat_error_response,
}
"""How an API puts errors, by what its paths begin with; all other paths have OpenAI's envelope."""


APIS = {fal.PATHS: "fal", zai.PATHS: "zai", pixazo.NESTED_PATHS: "pixazo", pixazo.FLAT_PATHS: "pixazo"}
"""What an API is called, by what its paths begin with; all other paths are those of OpenAI's and our own."""


def api_of(scope: Scope) -> str:
    """The API that a request's path belongs to."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return next((api for beginnings, api in APIS.items() if path.startswith(beginnings)), "openai")


def error_response(scope: Scope, error: RequestError | InvalidParameter) -> JSONResponse:
    """The answer to a request that fails, in the words of its API."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    for beginnings, respond in ENVELOPES.items():
        if path.startswith(beginnings):
            return respond(error)
    return openai.error_response(error)


def create_app(
    config: AppConfig,
    generator: Generator,
    lifecycle: Lifecycle,
    files: FileStore,
    database: Database,
    outbound: Outbound,
) -> FastAPI:
    """The application, whose parts are given to it.

    Raises:
        ValueError: a variable of the environment that is to hold an API key is not set.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            lifecycle.telling(),
            files.sweeping(),
            webhooks.delivering(),
            runner.working(),
            gauges.telling(),
        ):
            yield
        database.close()
        await asyncio.to_thread(tracing.stop)

    app = FastAPI(
        title="GLM-Image server",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    limits, links = config.limits, Links(files, config.public_url)
    sources = SourceReader(outbound, files, limits)
    reader = RequestReader(generator, sources, limits)
    store = JobStore(database, max_jobs=limits.max_jobs, ttl_s=config.storage.ttl_s)
    runner = JobRunner(store, generator, files, sources, outbound)
    signer, delivery = Signer(database), Delivery(generator, files, links)
    gauges = Gauges(generator, store, files)
    uploads = Uploads(files, signer, limits.max_image_bytes)
    views, fal_views = jobs.Views(delivery, links), fal.Views(delivery)
    compose = {jobs.API: views.message, fal.API: fal_views.message}
    webhooks = Webhooks(store, outbound, signer, compose, config.outbound.timeout_s)
    routers = [
        openai.router(generator, delivery, reader, limits),
        jobs.router(generator, runner, store, reader, views, links, signer, limits),
        native.router(generator, lifecycle, files, gauges, limits),
        fal.router(generator, delivery, runner, store, sources, fal_views, uploads, links, limits),
        zai.router(generator, delivery, runner, store, links, limits),
        pixazo.router(generator, delivery, runner, store, sources, links, limits),
    ]
    for router in routers:
        app.include_router(router)
    app.routes.extend(playground.routes())
    app.state.runner = runner
    document = functools.cache(functools.partial(describe, app, routers))
    app.openapi = document  # type: ignore[method-assign]  # FastAPI's way to have another document
    app.add_middleware(HeadAsGet)
    app.add_middleware(HangUpGuard)
    # The last one comes first: whoever has no key is refused before anything of a body is read.
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(
        Authentication,
        keys=Keys(config.auth),
        open_to_all=config.auth.open,
        respond=error_response,
    )
    app.add_middleware(fal.Addresses)
    app.add_middleware(telemetry.Requests, api_of=api_of)

    @functools.cache
    def document_as_yaml() -> str:
        return yaml.safe_dump(document(), sort_keys=False)

    @app.get("/openapi.yaml", include_in_schema=False)
    def openapi_yaml() -> Response:
        """The same document as `/openapi.json`."""
        return Response(document_as_yaml(), media_type="application/yaml")

    @app.exception_handler(RequestError)
    @app.exception_handler(InvalidParameter)
    async def request_error(request: Request, error: RequestError | InvalidParameter) -> JSONResponse:
        telemetry.note_error(request, error.code)
        return error_response(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        """FastAPI's own, of a query's parameters or a header."""
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        worded = RequestError(f"{param or 'The query'}: {first['msg']}.", param=param)
        telemetry.note_error(request, worded.code)
        return error_response(request.scope, worded)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        """Starlette's own: no such route, no such method, a broken form."""
        code = HTTPStatus(error.status_code).name.lower()
        worded = RequestError(f"{error.detail.rstrip('.')}.", code=code, status=error.status_code)
        telemetry.note_error(request, code)
        response = error_response(request.scope, worded)
        response.headers.update(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette names the first route's only
            methods = {
                method
                for router in routers
                for route in router.routes
                if isinstance(route, APIRoute) and route.matches(request.scope)[0] != Match.NONE
                for method in route.methods or ()
            }
            response.headers["Allow"] = ", ".join(sorted(methods))
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, _: Exception) -> JSONResponse:
        """Starlette raises the fault again afterwards, so that it reaches the log."""
        telemetry.note_error(request, server_error().code)
        return error_response(request.scope, server_error())

    return app


NOT_BY_HEAD = ("/unload", "/events", "/stream")
"""What a look must not do, and what would not end."""


class HeadAsGet:
    """Has HEAD answered where GET is; the HTTP server leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope.get("method") == "HEAD" and not scope["path"].endswith(NOT_BY_HEAD):
            scope["method"] = "GET"
        await self._app(scope, receive, send)


class HangUpGuard:
    """Refuses the header with which Ray Serve's proxy is told not to notice when the client has gone.

    The work of such a request would go on for nobody. (`parse_disconnect_disabled_header` in Ray's
    serve/_private/http_util.py.)
    """

    HEADER = (b"x-request-disconnect-disabled", b"?1")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        app = self._app
        if self.HEADER in scope.get("headers", ()):
            name = self.HEADER[0].decode()
            app = error_response(scope, RequestError(f"The header {name} is not allowed.", param=name))
        await app(scope, receive, send)


class BodyLimit:
    """Refuses a body as soon as too much of it has come in, or is announced, or it takes too long.

    All bodies together are bounded too: they come in before there is a place for their requests.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._max_bytes = limits.max_body_bytes
        self._max_together = limits.max_bodies_bytes
        self._timeout_s = limits.body_timeout_s
        self._together = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; count the body's bytes on the way."""
        received = 0
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        deadline: float | None = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal received, deadline
            if announced.isdigit() and int(announced) > self._max_bytes:
                raise too_large(self._max_bytes)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise too_slow(self._timeout_s) from None
            if not message.get("more_body"):
                deadline = None  # what comes after the body is that the client has gone
            size = len(message.get("body", b""))
            received += size
            self._together += size
            if received > self._max_bytes:
                raise too_large(self._max_bytes)
            if self._together > self._max_together:
                raise too_much_at_once()
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._together -= received
