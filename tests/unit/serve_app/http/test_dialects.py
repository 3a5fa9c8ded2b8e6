"""A new API is one `Dialect` in a tuple. The toy below is complete in 25 lines."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from deployments.types import ImageRequest
from serve_app.dialects import DIALECTS
from serve_app.dialects.base import Dialect, dialect_of
from serve_app.errors import RequestError
from serve_app.generation.request import GenerationRequest
from serve_app.http.application import create_app
from serve_app.http.errors import headers_of, status_of
from serve_app.http.services import Services

NAMES = {"prompt": "text", "n": "count"}
"""The toy's names of parameters that have other names here."""


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/toy")

    @routes.get("/images")
    async def draw(request: Request, text: str, count: int = 1, seed: int | None = None) -> list[str]:
        """Draws images and returns their URLs."""
        wanted = GenerationRequest(prompt=text, n=count, seed=seed, api="toy", key_id=request.state.key_id)
        made = await services.delivery.make(wanted, services.base(request))
        return [image.data_url for image in made]

    return routes


def error_response(error: RequestError, _: Any) -> JSONResponse:
    worded = error.for_api(NAMES)
    body = {"problem": worded.message, "field": worded.param}
    return JSONResponse(body, status_of(worded), headers_of(worded))


TOY = Dialect(name="toy", prefixes=("/toy/",), routers=(router,), error_response=error_response)

Call = Callable[..., httpx.Response]


@pytest.fixture
def app(make_services: Callable[..., Services]) -> FastAPI:
    return create_app(make_services(), (*DIALECTS, TOY))


def test_a_new_dialect_makes_images(app: FastAPI, call: Call, requested: list[ImageRequest]) -> None:
    answer = call(app, "GET", "/toy/images", params={"text": "a boat", "count": 2, "seed": 7})
    assert answer.status_code == 200
    assert sorted((request.prompt, request.seed) for request in requested) == [("a boat", 7), ("a boat", 8)]
    for url in answer.json():
        assert call(app, "GET", url).content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        (
            "GET",
            "/toy/nothing",
            404,
            {
                "problem": "The server has no path '/toy/nothing'; `/openapi.json` lists all paths.",
                "field": None,
            },
        ),
        ("POST", "/toy/images", 405, {"problem": "The path does not allow POST; choose GET.", "field": None}),
        ("GET", "/toy/images?text=%20", 400, {"problem": "text must not be empty.", "field": "text"}),
        (
            "GET",
            "/toy/images?text=a&count=11",
            400,
            {"problem": "count must be 1 to 10, not 11.", "field": "count"},
        ),
        ("GET", "/toy/images", 400, {"problem": "text: Field required.", "field": "text"}),
    ],
)
def test_errors_below_its_prefix_have_its_form(
    app: FastAPI, call: Call, method: str, path: str, status: int, body: dict[str, Any]
) -> None:
    answer = call(app, method, path)
    assert (answer.status_code, answer.json()) == (status, body)


def test_a_rejected_key_is_an_error_in_its_form(
    make_services: Callable[..., Services], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_KEY", "secret")
    keys = {"api_keys": [{"id": "a", "secret_env": "TOY_KEY"}]}
    app = create_app(make_services(auth=keys), (*DIALECTS, TOY))
    answer = call(app, "GET", "/toy/images?text=a")
    assert answer.status_code == 401
    assert set(answer.json()) == {"problem", "field"}
    assert answer.headers["www-authenticate"] == "Bearer"
    header = {"Authorization": "Bearer secret"}
    assert call(app, "GET", "/toy/images?text=a", headers=header).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/toynothing", "/nothing"])
def test_errors_elsewhere_keep_their_form(app: FastAPI, call: Call, path: str) -> None:
    answer = call(app, "GET", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_its_routes_are_in_the_openapi_document(app: FastAPI, call: Call) -> None:
    document = call(app, "GET", "/openapi.json").json()
    assert "get" in document["paths"]["/toy/images"]
    assert "/v1/images/generations" in document["paths"]


@pytest.mark.parametrize(
    ("path", "root_path", "name"),
    [
        ("/toy/images", "", "toy"),
        ("/below/toy/images", "/below", "toy"),
        ("/v1/images/generations", "", "openai"),
        ("/", "", "openai"),
        ("/v2/requests/status/1", "", "pixazo"),
    ],
)
def test_a_path_belongs_to_the_dialect_of_its_longest_prefix(path: str, root_path: str, name: str) -> None:
    scope = {"path": path, "root_path": root_path}
    assert dialect_of(scope, (*DIALECTS, TOY)).name == name


def test_the_longest_prefix_decides_whatever_the_order() -> None:
    def dialect(name: str, *prefixes: str) -> Dialect:
        return Dialect(name=name, prefixes=prefixes, routers=(), error_response=error_response)

    short, long = dialect("short", "/a/"), dialect("long", "/a/b/")
    for dialects in ((short, long), (long, short)):
        assert dialect_of({"path": "/a/b/c"}, dialects) is long
        assert dialect_of({"path": "/a/c"}, dialects) is short
