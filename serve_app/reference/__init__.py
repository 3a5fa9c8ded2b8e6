"""The API reference: a page at `/docs` that shows the OpenAPI document and sends requests.

The page is Swagger UI: https://swagger.io/tools/swagger-ui. Its files come from the package
`fastapi-swagger`, whose code is not used. `static/reference.js` has the settings and corrections.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute, Mount, Route

from serve_app.http.pages import POLICY, Files, headers

FOLDER = Path(__file__).parent
LIBRARY = Path(str(distribution("fastapi-swagger").locate_file("fastapi_swagger/resources")))
LIBRARY_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
HEADERS = headers(POLICY | {"img-src": "'self' blob: data:"})
"""Headers of the page and its files. Swagger UI's style sheet has icons in data URLs, which load nothing."""


def routes() -> list[BaseRoute]:
    """Returns the routes of the page and its files, with gzip for clients that accept it."""
    library = [
        Route(f"/docs/{name}", GZipMiddleware(Files(LIBRARY, HEADERS, name=name))) for name in LIBRARY_FILES
    ]
    return [
        Route("/docs", GZipMiddleware(Files(FOLDER, HEADERS, name="index.html")), name="reference"),
        *library,
        Mount("/docs", GZipMiddleware(Files(FOLDER / "static", HEADERS))),
    ]
