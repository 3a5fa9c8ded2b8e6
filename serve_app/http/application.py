"""The HTTP application: the routes of all dialects, the order of middleware, and the answers to errors."""

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
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from deployments.observability import tracing
from serve_app import playground, reference
from serve_app.background import Periodic, end_calls
from serve_app.dialects import DIALECTS
from serve_app.dialects.base import Dialect, dialect_of
from serve_app.errors import Invalid, RequestError, Unavailable, server_error
from serve_app.http.auth import RELOAD_S, Authentication, Keys
from serve_app.http.errors import ProtocolError, status_of
from serve_app.http.middleware import BodyLimit, HeadAsGet, HeaderGuard, PrefixSlash
from serve_app.http.openapi import describe
from serve_app.http.sites import SiteGuard, hosts_of
from serve_app.jobs.webhooks import Webhooks
from serve_app.observability import gauges, telemetry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from fastapi import APIRouter
    from fastapi.responses import JSONResponse
    from starlette.types import Scope

    from serve_app.http.services import Services

    Respond = Callable[[Scope, RequestError], JSONResponse]

END_TIMEOUT_S = 10.0
"""Seconds for calls that run to their end when the server stops."""


def create_app(services: Services, dialects: tuple[Dialect, ...] = DIALECTS) -> FastAPI:
    """Returns the application. It needs no Ray.

    Raises:
        OSError: the file of API keys cannot be read.
        ValueError: the environment variable of an API key is not set, or the file has no list of keys.
    """
    limits, auth = services.config.limits, services.config.auth
    keys = Keys(auth)
    app = FastAPI(
        title="GLM-Image server",
        version="1",
        openapi_tags=[
            {"name": name, "description": text} for dialect in dialects for name, text in dialect.tags.items()
        ],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(services, dialects, keys),
        generate_unique_id_function=lambda route: route.name,
    )
    routers = [router(services) for dialect in dialects for router in dialect.routers]
    for router in routers:
        app.include_router(router)
    first = services.config.models[0].name
    wake = functools.partial(services.lifecycle.wake, first) if services.config.wake_on_open else None
    app.routes.extend([*playground.routes(wake), *reference.routes()])
    _add_document(app, routers)

    def respond(scope: Scope, error: RequestError) -> JSONResponse:
        telemetry.note_error(error.code, status_of(error))
        return dialect_of(scope, dialects).error_response(error, scope)

    _add_error_handlers(app, routers, respond)
    # The last one runs first: a request without a key is rejected before its body is read.
    app.add_middleware(HeadAsGet)
    app.add_middleware(HeaderGuard, respond=respond)
    app.add_middleware(BodyLimit, limits=limits)
    app.add_middleware(SiteGuard, hosts=hosts_of(services.config), respond=respond)
    app.add_middleware(Authentication, keys=keys, open_to_all=auth.open, respond=respond)
    app.add_middleware(PrefixSlash)
    for dialect in dialects:
        if dialect.middleware:
            app.add_middleware(dialect.middleware)
    app.add_middleware(
        telemetry.Requests,
        api_of=lambda scope: dialect_of(scope, dialects).name,
        disconnects=(ClientDisconnect, OSError),
        recent=services.recent,
    )
    return app


def _lifespan(
    services: Services, dialects: tuple[Dialect, ...], keys: Keys
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Returns the application's lifespan, which runs the periodic tasks, the jobs and the webhooks."""
    compose = {api: make(services) for dialect in dialects for api, make in dialect.webhooks.items()}
    webhooks = Webhooks(
        services.jobs, services.outbound, services.signer, compose, services.config.outbound.timeout_s
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [
            *services.lifecycle.reporting,
            Periodic(
                name="delete old files",
                run=services.files.sweep,
                interval_s=services.files.sweep_interval_s,
            ),
            Periodic(
                name="update gauges",
                run=services.gauges.update,
                interval_s=gauges.INTERVAL_S,
                expected=(Unavailable,),
            ),
        ]
        if services.config.auth.keys_file:
            tasks.append(Periodic(name="read keys", run=keys.reload, interval_s=RELOAD_S))
        async with (
            services.background.run(tasks),
            webhooks.run_in_background(services.background),
            services.runner.run_in_background(),
        ):
            yield
        await end_calls(END_TIMEOUT_S)
        services.database.close()
        await asyncio.to_thread(tracing.stop)

    return lifespan


def _add_document(app: FastAPI, routers: list[APIRouter]) -> None:
    """Adds the OpenAPI document, in JSON and in YAML."""
    document = functools.cache(functools.partial(describe, app, routers))
    app.openapi = document  # type: ignore[method-assign]  # FastAPI's way to replace the document

    @functools.cache
    def in_yaml() -> str:
        return yaml.safe_dump(document(), sort_keys=False)

    @app.get("/openapi.yaml", include_in_schema=False)
    def openapi_yaml() -> Response:
        """Returns the document of `/openapi.json` in YAML."""
        return Response(in_yaml(), media_type="application/yaml")


def _add_error_handlers(app: FastAPI, routers: list[APIRouter], respond: Respond) -> None:
    def answer(request: Request, error: RequestError) -> JSONResponse:
        return respond(request.scope, error)

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        """Answers FastAPI's errors over a query parameter or a header."""
        first = error.errors()[0]
        place, *names = first["loc"]
        param = ".".join(map(str, names)) or None
        return answer(request, Invalid(f"{param or f'The {place}'}: {first['msg']}.", param=param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        """Answers Starlette's errors: no such route, no such method, a broken form."""
        headers = dict(error.headers or {})
        message = f"{error.detail.rstrip('.')}."
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"The server has no path {request.url.path!r:.100}; `/openapi.json` lists all paths."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # Starlette names the methods of the path's first route only.
            methods = _methods(routers, request.scope)
            headers |= {"Allow": ", ".join(sorted(methods))} if methods else {}
            message = (
                f"The path does not allow {request.method:.20}; choose {headers.get('Allow', 'another')}."
            )
        return answer(request, ProtocolError(message, status=error.status_code, headers=headers))

    @app.exception_handler(Exception)
    async def fault(request: Request, _: Exception) -> JSONResponse:
        """Answers a fault. Starlette raises it again afterwards, so that it is logged."""
        return respond(request.scope, server_error())


def _methods(routers: list[APIRouter], scope: Scope) -> set[str]:
    """Returns the methods of a path."""
    return {
        method
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and route.matches(scope)[0] != Match.NONE
        for method in route.methods or ()
    }
