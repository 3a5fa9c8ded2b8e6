"""The HTTP application without Ray: the file store's part in answers, and all bodies together."""

import asyncio
import base64
import io
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from deployments.config import ModelConfig
from deployments.types import ImageRequest, Pixels, PriorTokens
from serve_app.config import AppConfig
from serve_app.files.store import FileStore
from serve_app.generation.generator import Generator
from serve_app.generation.image import Model
from serve_app.http.application import create_app
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound


async def decode(request: ImageRequest) -> AsyncGenerator[Pixels, None]:
    yield np.zeros((request.height, request.width, 3), dtype=np.uint8)


Make = Callable[..., FastAPI]


@pytest.fixture
def asked() -> list[ImageRequest]:
    """What the prior stage was asked for."""
    return []


@pytest.fixture
def make(model_config: Callable[..., ModelConfig], tmp_path: Path, asked: list[ImageRequest]) -> Make:
    async def prior(request: ImageRequest) -> AsyncGenerator[PriorTokens, None]:
        asked.append(request)
        yield PriorTokens(target=np.zeros((16, 16), dtype=np.int64))

    def app(limits: dict[str, int] | None = None, description: str | None = None, **storage: Any) -> FastAPI:
        model = model_config().model_copy(update={"description": description})
        config = AppConfig.model_validate(
            {
                "models": [model.model_dump()],
                "auth": {"open": True},
                "limits": limits or {},
                "storage": {"url": str(tmp_path / "files"), "min_free_bytes": 0} | storage,
            }
        )
        generator = Generator({"m": Model(config=model, prior=prior, decode=decode)}, config.limits)
        lifecycle: Any = None  # asked by routes that are not tested here
        database = Database(f"sqlite:///{tmp_path}/jobs.db")
        outbound = Outbound(config.outbound)
        return create_app(config, generator, lifecycle, FileStore(config.storage), database, outbound)

    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here:80")


def ask(app: FastAPI, **fields: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        async with client_of(app) as client:
            answer = await client.post("/v1/images/generations", json={"prompt": "a boat"} | fields)
            if answer.status_code == 200 and (url := answer.json()["data"][0].get("url")):
                assert url.startswith("http://here")
                return await client.get(url)
            return answer

    return asyncio.run(post())


def test_an_image_is_kept_and_handed_out(make: Make) -> None:
    file = ask(make())
    assert file.content.startswith(b"\x89PNG")
    assert file.headers["content-type"] == "image/png"


def test_a_full_disk_refuses_files_before_any_work_and_images_in_answers_come_all_the_same(
    make: Make, tmp_path: Path, asked: list[ImageRequest]
) -> None:
    app = make(min_free_bytes=2**60)
    refused = ask(app)
    assert refused.status_code == 507
    assert refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"]["code"] == "storage_full"
    assert asked == []
    made = ask(app, response_format="b64_json")
    assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert list((tmp_path / "files").iterdir()) == []


def test_all_bodies_together_are_bounded_and_forgotten_when_their_requests_end(make: Make) -> None:
    app = make(limits={"max_bodies_bytes": 4000})
    for _ in range(3):
        assert ask(app, user="x" * 500).status_code == 200
    refused = ask(app, prompt="x" * 4000)
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert ask(app, prompt="x" * 3000).status_code == 200


def test_the_playground_is_sent_compressed_and_once(make: Make) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            page = await client.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.headers["content-encoding"] == "gzip"
            policy = page.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} < set(policy)
            assert "unsafe" not in page.headers["content-security-policy"]
            for path in re.findall(r'(?:href|src)="(playground/[^"]*)"', page.text):
                file = await client.get(f"/{path}")
                assert file.status_code == 200, path
                again = await client.get(f"/{path}", headers={"If-None-Match": file.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")

    asyncio.run(main())


@pytest.mark.parametrize("description", [None, "A demo, which knows circles alone."])
def test_a_models_description_is_told(make: Make, description: str | None) -> None:
    async def main() -> None:
        async with client_of(make(description=description)) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert model["description"] == description
            assert (await client.get("/v1/models/m")).json() == model

    asyncio.run(main())


def test_a_file_that_has_not_changed_is_not_sent_again(make: Make) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            made = await client.post("/v1/images/generations", json={"prompt": "a boat"})
            url = made.json()["data"][0]["url"]
            file = await client.get(url)
            again = await client.get(url, headers={"If-None-Match": file.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert (await client.get(url, headers={"If-None-Match": '"another"'})).content == file.content

    asyncio.run(main())


def test_browsers_ends_of_lines_are_those_of_all_others(make: Make, asked: list[ImageRequest]) -> None:
    """In forms they come as CR and LF: https://www.rfc-editor.org/rfc/rfc7578#section-4.1."""

    async def main() -> None:
        picture = io.BytesIO()
        Image.new("RGB", (512, 512)).save(picture, "PNG")
        async with client_of(make()) as client:
            for prompt in ("a\r\nb", "a\nb"):
                files = {"image": ("a.png", picture.getvalue())}
                answer = await client.post("/v1/images/edits", data={"prompt": prompt}, files=files)
                assert answer.status_code == 200, answer.text

    asyncio.run(main())
    assert [request.prompt for request in asked] == ["a\nb"] * 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/", 200),
        ("POST", "/", 405),
        ("GET", "/playground/nothing.js", 404),
        ("GET", "/playground/../__init__.py", 404),
        ("GET", "/playground/%2e%2e/__init__.py", 404),
        ("GET", "/playground/", 404),
    ],
)
def test_of_the_playground_nothing_else_is_sent(make: Make, method: str, path: str, status: int) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            answer = await client.request(method, path)
            assert answer.status_code == status
            if status >= 400:
                assert answer.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(main())
