"""The HTTP application without Ray: files in answers, bounds on bodies, and the playground."""

import asyncio
import base64
import io
import json
import logging
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import httpx
import pytest
import ray
import torch
import transformers
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import update
from sqlalchemy.orm import Session

from deployments.families import FAMILIES
from deployments.types import ImageRequest
from serve_app import __version__
from serve_app.background import Periodic
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.tables import Job
from serve_app.observability import metrics
from tests.unit.serve_app.http.conftest import Call, MakeServices, client_of, scope_of

Make = Callable[..., FastAPI]


@pytest.fixture
def make(make_services: Callable[..., Services]) -> Make:
    return lambda **config: create_app(make_services(**config))


def ask(app: FastAPI, **fields: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        async with client_of(app) as client:
            answer = await client.post("/v1/images/generations", json={"prompt": "a boat"} | fields)
            if answer.status_code == 200 and (url := answer.json()["data"][0].get("url")):
                assert url.startswith("http://localhost")
                return await client.get(url)
            return answer

    return asyncio.run(post())


def test_an_image_is_kept_and_served(make: Make) -> None:
    file = ask(make())
    assert file.content.startswith(b"\x89PNG")
    assert file.headers["content-type"] == "image/png"


def test_a_full_disk_rejects_files_before_any_work_and_allows_images_in_answers(
    make: Make, tmp_path: Path, requested: list[ImageRequest]
) -> None:
    app = make(storage={"min_free_bytes": 2**60})
    refused = ask(app)
    assert refused.status_code == 507
    assert refused.headers["x-should-retry"] == "false"
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("storage_full", "response_format")
    assert "in the answer itself" in error["message"]
    assert requested == []
    made = ask(app, response_format="b64_json")
    assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert list((tmp_path / "files").iterdir()) == []


def test_all_bodies_together_are_bounded_while_their_requests_last(make: Make) -> None:
    app = make(limits={"max_bodies_bytes": 4000})
    for _ in range(3):
        assert ask(app, user="x" * 500).status_code == 200
    refused = ask(app, prompt="x" * 4000)
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert ask(app, prompt="x" * 3000).status_code == 200


def test_the_playground_is_compressed_and_cached(make: Make) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            page = await client.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.headers["content-encoding"] == "gzip"
            policy = page.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} < set(policy)
            assert "unsafe" not in page.headers["content-security-policy"]
            named = re.findall(r'(?:href|src)="(playground/[^"]*)"', page.text)
            for path in named + re.findall("<(playground/[^>]*)>; rel=modulepreload", page.headers["link"]):
                file = await client.get(f"/{path}")
                assert file.status_code == 200, path
                again = await client.get(f"/{path}", headers={"If-None-Match": file.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")

    asyncio.run(main())


@pytest.mark.parametrize("wakes", [True, False])
def test_opening_the_page_wakes_the_first_model(make: Make, *, wakes: bool) -> None:
    woken: list[str] = []

    async def main() -> None:
        async with client_of(
            make(lifecycle=SimpleNamespace(wake=woken.append), wake_on_open=wakes)
        ) as client:
            for path in ("/playground/main.js", "/v1/models"):
                await client.get(path)
            assert woken == []
            assert (await client.get("/")).status_code == 200

    asyncio.run(main())
    assert woken == ["m"] * wakes


def test_versions_need_no_key_and_are_the_installed_ones(make_services: MakeServices, call: Call) -> None:
    async def statuses() -> dict[str, Any]:
        return {}

    keys = [{"id": "k", "sha256": sha256(b"K").hexdigest()}]
    lifecycle = SimpleNamespace(statuses=statuses)
    app = create_app(make_services(lifecycle=lifecycle, auth={"open": False, "api_keys": keys}))
    packages = {one.__name__: one.__version__ for one in (ray, torch, diffusers, transformers)}
    assert call(app, "GET", "/version").json() == {"version": __version__} | packages
    assert call(app, "GET", "/health").json()["version"] == __version__


@pytest.mark.parametrize("description", [None, "A demo that knows only circles."])
def test_a_models_description_is_listed(make: Make, description: str | None) -> None:
    async def main() -> None:
        async with client_of(make(description=description)) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert model["description"] == description
            assert (await client.get("/v1/models/m")).json() == model

    asyncio.run(main())


@pytest.mark.parametrize("examples", [(), ("a circle", "a star")])
def test_a_models_examples_are_listed_or_else_its_familys(make: Make, examples: tuple[str, ...]) -> None:
    async def main() -> None:
        async with client_of(make(examples=examples)) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert model["examples"] == list(examples or FAMILIES["glm_image"].examples)

    asyncio.run(main())


def test_a_file_that_has_not_changed_is_not_sent_again(make: Make) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            made = await client.post("/v1/images/generations", json={"prompt": "a boat"})
            url = made.json()["data"][0]["url"]
            file = await client.get(url)
            etag = file.headers["etag"]
            for known in (etag, f'"another", W/{etag}', "*"):
                again = await client.get(url, headers={"If-None-Match": known})
                assert (again.status_code, again.content) == (304, b"")
            assert (await client.get(url, headers={"If-None-Match": '"another"'})).content == file.content

    asyncio.run(main())


def test_line_ends_of_browsers_become_plain_ones(make: Make, requested: list[ImageRequest]) -> None:
    """Browsers send CR and LF in forms: https://www.rfc-editor.org/rfc/rfc7578#section-4.1."""

    async def main() -> None:
        picture = io.BytesIO()
        Image.new("RGB", (512, 512)).save(picture, "PNG")
        async with client_of(make()) as client:
            for prompt in ("a\r\nb", "a\nb"):
                files = {"image": ("a.png", picture.getvalue())}
                answer = await client.post("/v1/images/edits", data={"prompt": prompt}, files=files)
                assert answer.status_code == 200, answer.text

    asyncio.run(main())
    assert [request.prompt for request in requested] == ["a\nb"] * 2


@pytest.mark.parametrize(
    ("path", "level"),
    [
        ("/", "DEBUG"),
        ("/playground/main.js", "DEBUG"),
        ("/playground/icon.svg", "DEBUG"),
        ("/playground/nothing.js", "INFO"),
        ("/docs", "DEBUG"),
        ("/docs/swagger-ui.css", "DEBUG"),
        ("/docs/nothing.js", "INFO"),
        ("/nothing", "INFO"),
        ("/openapi.json", "INFO"),
    ],
)
def test_only_errors_of_the_pages_and_their_files_are_logged_and_counted(
    make: Make,
    call: Call,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    level: str,
) -> None:
    counted: list[dict[str, str]] = []
    monkeypatch.setattr(metrics.REQUESTS, "add", lambda **labels: counted.append(labels))
    caplog.set_level(logging.DEBUG, "ray.serve")
    call(make(), "GET", path)
    (line,) = [line for line in caplog.records if vars(line).get("event") == "request"]
    assert line.levelname == level
    assert len(counted) == (level == "INFO")


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
def test_only_files_of_the_playground_are_served(make: Make, method: str, path: str, status: int) -> None:
    async def main() -> None:
        async with client_of(make()) as client:
            answer = await client.request(method, path)
            assert answer.status_code == status
            if status >= 400:
                assert answer.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(main())


def test_the_periodic_tasks_run_as_long_as_the_application(
    make_services: Callable[..., Services], tmp_path: Path
) -> None:
    reports: list[None] = []

    async def report() -> None:
        reports.append(None)

    async def main() -> None:
        task = Periodic(name="report demand", run=report, interval_s=0.01)
        services = make_services(lifecycle=SimpleNamespace(reporting=[task]), storage={"ttl_s": 1})
        app = create_app(services)
        await services.files.save(b"data", "png")
        async with app.router.lifespan_context(app), asyncio.timeout(20):
            while list((tmp_path / "files").iterdir()) or len(reports) < 3:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
            assert services.background.failing == []
        ended = len(reports)
        await asyncio.sleep(0.05)
        assert len(reports) == ended

    asyncio.run(main())


def test_the_line_of_a_rejected_request_has_its_error_and_its_model(
    make: Make, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    keys = [{"id": "k", "sha256": sha256(b"K").hexdigest()}]
    app = make(limits={"max_images": 1}, auth={"open": False, "api_keys": keys})
    body = {"prompt": "a boat", "n": 2}
    answers = [
        call(app, "POST", "/v1/images/generations", json=body, headers=headers)
        for headers in ({}, {"Authorization": "Bearer K"})
    ]
    assert [answer.status_code for answer in answers] == [401, 400]
    lines = [vars(line) for line in caplog.records]
    assert [line["error"] for line in lines] == ["missing_api_key", "invalid_value"]
    assert (lines[0].get("model"), lines[1]["model"]) == (None, "m")


def test_a_client_that_reads_until_after_the_deadline_gets_its_image(make_services: MakeServices) -> None:
    """The request has given up its place by then."""
    services = make_services(limits={"deadline_s": 2})
    app = create_app(services)
    body = json.dumps({"prompt": "a boat", "size": "512x512", "stream": True}).encode()
    bodies: list[Any] = []

    async def main() -> None:
        hangs = asyncio.Event()
        left = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            if (message := next(left, None)) is None:
                await hangs.wait()
            return message

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                async with asyncio.timeout(20):
                    while services.generator.pending:  # noqa: ASYNC110 - there is no event for it
                        await asyncio.sleep(0.01)
                bodies.append(message)

        await app(scope_of("POST", "/v1/images/generations"), receive, send)

    asyncio.run(main())
    (image,) = bodies
    assert re.findall(rb"^event: (.*)$", image["body"], re.MULTILINE) == [b"image_generation.completed"]
    assert not image["more_body"]


def test_a_fault_is_an_error_without_details_and_is_raised_for_the_log(
    make_services: Callable[..., Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    services = make_services()
    app = create_app(services)

    def fail() -> None:
        raise RuntimeError("a secret")

    async def get(*, raises: bool) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/models")

    monkeypatch.setattr(services.generator, "models", fail)
    answer = asyncio.run(get(raises=False))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "server_error"
    with pytest.raises(RuntimeError, match="a secret"):
        asyncio.run(get(raises=True))


def test_a_job_for_another_model_says_what_it_waits_for(make_services: MakeServices, call: Call) -> None:
    services = make_services()
    app = create_app(services)
    job_id = call(app, "POST", "/v1/images/jobs", json={"prompt": "a boat", "size": "512x512"}).json()["id"]
    mine = call(app, "GET", f"/v1/images/jobs/{job_id}").json()
    assert (mine["status"], "waiting_for" in mine, mine["log"]) == ("queued", False, [])

    def meant_for_another(session: Session) -> None:
        session.execute(update(Job).values(identity="glm_image-0123456789abcdef"))

    async def main() -> None:
        await services.database.write(meant_for_another)
        await services.gauges.update()

    asyncio.run(main())
    shown = call(app, "GET", f"/v1/images/jobs/{job_id}").json()
    (model,) = call(app, "GET", "/v1/models").json()["data"]
    for identity in ("glm_image-0123456789abcdef", model["identity"]):
        assert identity in shown["waiting_for"]
    assert [line["message"] for line in shown["log"]] == [shown["waiting_for"]]
    (listed,) = call(app, "GET", "/v1/images/jobs").json()["data"]
    assert listed["waiting_for"] == shown["waiting_for"]
    assert services.gauges.jobs_foreign == {"glm_image-0123456789abcdef": 1}


def test_the_prefix_without_its_slash_leads_to_the_playground(make: Make) -> None:
    async def get() -> httpx.Response:
        keys = [{"id": "a", "sha256": sha256(b"key").hexdigest()}]
        app = make(auth={"open": False, "api_keys": keys})
        transport = httpx.ASGITransport(app, root_path="/below/img")
        async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
            return await client.get("http://localhost/below/img")

    answer = asyncio.run(get())
    assert str(answer.url) == "http://localhost/below/img/"
    assert answer.status_code == 200
    assert "<title>" in answer.text
