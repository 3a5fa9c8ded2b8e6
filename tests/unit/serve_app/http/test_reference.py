"""The API reference at `/docs` without a browser: its page, files and headers, and the tags of the routes."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI

from serve_app import playground, reference
from serve_app.http.application import create_app
from serve_app.http.services import Services
from tests.unit.serve_app.http.conftest import Call

PAGE = (reference.FOLDER / "index.html").read_text()
FILES = re.findall(r'(?:href|src)="(docs/[^"]*)"', PAGE)


@pytest.fixture
def app(make_services: Callable[..., Services]) -> FastAPI:
    """An application that requires a key."""
    keys = [{"id": "k", "sha256": sha256(b"K").hexdigest()}]
    return create_app(make_services(auth={"open": False, "api_keys": keys}))


@asynccontextmanager
async def below(app: FastAPI, prefix: str) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a client of an application that is served below a prefix."""
    transport = httpx.ASGITransport(app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("prefix", ["", "/below/img"])
def test_the_page_and_all_it_names_are_served_without_a_key(app: FastAPI, prefix: str) -> None:
    async def main() -> None:
        async with below(app, prefix) as client:
            page = await client.get(f"{prefix}/docs")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.text == PAGE
            named = re.findall(r'(?:href|src)="([^"]*)"', page.text)
            assert {"openapi.json", "openapi.yaml", "playground/icon.svg", *FILES} < set(named)
            for path in named:
                file = await client.get(urljoin(str(page.url), path))
                assert file.status_code == 200, path

    asyncio.run(main())


def test_all_files_are_compressed_and_revalidated(app: FastAPI, call: Call) -> None:
    names = {file.name for file in (reference.FOLDER / "static").iterdir()} | set(reference.LIBRARY_FILES)
    assert {path.removeprefix("docs/") for path in FILES} == names
    for path in ("docs", *FILES):
        file = call(app, "GET", f"/{path}")
        assert file.headers["content-encoding"] == "gzip"
        assert file.headers["cache-control"] == "no-cache"
        again = call(app, "GET", f"/{path}", headers={"If-None-Match": file.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_nothing_else_of_the_library_is_served(app: FastAPI, call: Call) -> None:
    assert (reference.LIBRARY / "__init__.py").exists()
    for path in ("", "__init__.py", "favicon-32x32.png", "index.html", "nothing.js"):
        answer = call(app, "GET", f"/docs/{path}")
        assert answer.status_code == 404, path
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_policy_differs_from_the_playgrounds_in_one_directive(app: FastAPI, call: Call) -> None:
    def policy(path: str) -> list[str]:
        return call(app, "GET", path).headers["content-security-policy"].split("; ")

    strict = policy("/")
    assert "; ".join(strict) == playground.HEADERS["Content-Security-Policy"]
    for path in ("/docs", "/docs/reference.js"):
        changed = set(policy(path)) ^ set(strict)
        assert changed == {"img-src 'self' blob:", "img-src 'self' blob: data:"}
    assert call(app, "GET", "/docs").headers["referrer-policy"] == "no-referrer"


def test_the_page_names_no_other_host_and_contains_no_code() -> None:
    assert re.findall(r'(?:href|src)="(?:[a-z]+:|/)', PAGE) == []
    assert re.findall(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", PAGE) == []
    styles = [reference.FOLDER / "static/reference.css", reference.LIBRARY / "swagger-ui.css"]
    for style in (file.read_text() for file in styles):
        assert set(re.findall(r"url\([\"']?([a-z]*:)?", style)) <= {"data:"}
        assert "@import" not in style


def test_each_route_has_one_tag_and_each_tag_a_description(app: FastAPI, call: Call) -> None:
    document = call(app, "GET", "/openapi.json").json()
    tags = {tag["name"]: tag["description"] for tag in document["tags"]}
    assert set(tags) == {"OpenAI", "Jobs", "Server", "Operator", "fal", "Z.ai", "Pixazo"}
    assert all(text.endswith(".") for text in tags.values())
    operations = [one for operations in document["paths"].values() for one in operations.values()]
    used = [tag for operation in operations for tag in operation["tags"]]
    assert len(used) == len(operations)
    assert set(used) == set(tags)
