"""The interface of a dialect: one API that the server speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import APIRouter
    from fastapi.responses import JSONResponse
    from starlette.types import ASGIApp, Scope

    from serve_app.errors import RequestError
    from serve_app.http.services import Services
    from serve_app.jobs.webhooks import Compose


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """An API.

    Attributes:
        name: its name in metrics, logs and requests.
        prefixes: what its paths begin with. The longest matching prefix decides whose a path is.
        routers: make its routes.
        error_response: words an error for a request.
        tags: a sentence about each tag of its routes, for the OpenAPI document.
        webhooks: make the messages of its ended jobs, by the `api` of the jobs; see
            `serve_app.jobs.tables.Owner`.
        middleware: wraps the application, before the API key is checked; None without one.
    """

    name: str
    prefixes: tuple[str, ...]
    routers: tuple[Callable[[Services], APIRouter], ...]
    error_response: Callable[[RequestError, Scope], JSONResponse]
    tags: Mapping[str, str] = field(default_factory=dict)
    webhooks: Mapping[str, Callable[[Services], Compose]] = field(default_factory=dict)
    middleware: Callable[[ASGIApp], ASGIApp] | None = None


def path_of(scope: Scope) -> str:
    """Returns a request's path below the application's root."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def dialect_of(scope: Scope, dialects: tuple[Dialect, ...]) -> Dialect:
    """Returns the dialect of a request's path; the first one if no prefix matches."""
    path = path_of(scope)
    matching = [
        (len(prefix), dialect)
        for dialect in dialects
        for prefix in dialect.prefixes
        if path.startswith(prefix)
    ]
    return max(matching, key=lambda match: match[0])[1] if matching else dialects[0]
