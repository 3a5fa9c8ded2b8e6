"""The OpenAPI document: https://spec.openapis.org/oas/v3.1.0. FastAPI's document of the routes, corrected."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from serve_app.http.auth import OPEN_PATHS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastapi import APIRouter, FastAPI

KEYS = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "`Authorization: Key KEY` is taken as well as `Authorization: Bearer KEY`.",
    },
    "subscription_key": {"type": "apiKey", "in": "header", "name": "Ocp-Apim-Subscription-Key"},
}
UNAUTHORIZED = {
    "description": "The API key is missing or invalid.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
}

CROSS_SITE = "The server needs no key, and a page of another site sent the request."


def describe(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    """Returns the document of an application and its routers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate Operation ID")  # corrected below
        document = get_openapi(title=app.title, version=app.version, routes=app.routes, tags=app.openapi_tags)
    for route in (route for router in routers for route in router.routes):
        # What FastAPI has written of it is replaced: a bound of 1 became 1.0.
        if isinstance(route, APIRoute) and route.openapi_extra:
            for method in route.methods or ():
                document["paths"][route.path][method.lower()] |= route.openapi_extra
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if len(operations) > 1:
                operation["operationId"] += f"_by_{method}"
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's own; here it is a 400
            if OPEN_PATHS.fullmatch(path):
                operation["security"] = []
                operation["responses"].pop("401", None)
            else:
                refusal = operation["responses"].setdefault("401", UNAUTHORIZED)
                operation["responses"].setdefault("403", refusal | {"description": CROSS_SITE})
    components = document["components"]
    components["securitySchemes"] = KEYS
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    document["security"] = [{name: []} for name in KEYS]
    return document
