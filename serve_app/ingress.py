"""The HTTP application: every dialect's routes, one place for errors, one cap on bodies."""

from __future__ import annotations

from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve_app.dialects import native, openai
from serve_app.errors import InvalidParameter, RequestError, too_large

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve_app.config import AppConfig
    from serve_app.generation import Generator
    from serve_app.lifecycle import Lifecycle
    from serve_app.storage import FileStore


def create_app(
    config: AppConfig,
    generator: Generator,
    lifecycle: Lifecycle,
    files: FileStore,
) -> FastAPI:
    """The application, whose parts are given to it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with lifecycle.telling():
            yield

    def link(request: Request, name: str) -> str:
        base = str(config.public_url or request.base_url)
        return f"{base.rstrip('/')}/files/{name}"

    app = FastAPI(title="GLM-Image server", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(openai.router(generator, files, link))
    app.include_router(native.router(generator, lifecycle, files, config.limits))
    app.add_middleware(BodyLimit, max_bytes=config.limits.max_body_bytes)

    @app.exception_handler(RequestError)
    @app.exception_handler(InvalidParameter)
    async def request_error(_: Request, error: RequestError | InvalidParameter) -> JSONResponse:
        return openai.error_response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        """FastAPI's own, of a query's parameters."""
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        return openai.error_response(RequestError(f"{param or 'The query'}: {first['msg']}.", param=param))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        """Starlette's own: no such route, no such method, a broken form."""
        code = HTTPStatus(error.status_code).name.lower()
        response = openai.error_response(
            RequestError(f"{error.detail.rstrip('.')}.", code=code, status=error.status_code)
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def server_error(_: Request, __: Exception) -> JSONResponse:
        """Starlette raises the fault again afterwards, so that it reaches the log."""
        return openai.server_error_response()

    return app


class BodyLimit:
    """Refuses a body as soon as more than `max_bytes` of it have come in, or are announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; count the body's bytes on the way."""
        received = 0
        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")

        async def counted() -> Message:
            nonlocal received
            if announced.isdigit() and int(announced) > self._max_bytes:
                raise too_large(self._max_bytes)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_large(self._max_bytes)
            return message

        await self._app(scope, counted, send)
