"""Tests of the operator's rights, which a user's key lacks."""

import asyncio
import csv
import hashlib
import io
import logging
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve_app.cluster.status import ReplicaReport
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.tables import Owner
from serve_app.observability import recent
from serve_app.observability.recent import day_of
from tests.unit.serve_app.http.conftest import Call, MakeServices
from tests.unit.serve_app.jobs.stored import IMAGE, claimed, no_news, submitted

JOBS, OPERATOR, UNLOAD = "/v1/images/jobs", "/v1/internal/operator", "/v1/internal/unload"
SECRET = "a prompt that is nobody's business"  # noqa: S105
NO_JOB = "00000000-0000-7000-8000-000000000000"
LOW = {"priority": "low"}
BODY = {"prompt": SECRET, "size": "512x512", "num_inference_steps": 4, "n": 2}


class Lifecycle:
    """A lifecycle that notes what it unloads."""

    def __init__(self) -> None:
        self.names = ["m"]
        self.unloaded: list[str] = []

    async def unload(self, names: list[str], **_: object) -> None:
        self.unloaded += names

    async def statuses(self, **_: object) -> dict[str, Any]:
        return {"m": {"prior": {"state": "ready", "replicas": 1}}}

    async def reports(self) -> list[ReplicaReport]:
        memory = {"device": "NVIDIA H200", "memory": {"allocated": 18, "free": 123}}
        ready: dict[str, Any] = {"state": "ready", "done": 5} | memory
        return [ReplicaReport("m", "prior", ready), ReplicaReport("m", "decoder", {"state": "loading"})]


def key(name: str, **fields: str) -> dict[str, str]:
    return {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **fields}


AUTH = {"api_keys": [key("alice"), key("bob", role="user"), key("olga", role="operator")]}


class Server:
    """An application whose requests have the keys of people. Nobody has none."""

    def __init__(self, make_services: MakeServices, call: Call, **auth: Any) -> None:
        self.lifecycle = Lifecycle()
        self.services: Services = make_services(lifecycle=self.lifecycle, auth=AUTH | auth)
        self.app: FastAPI = create_app(self.services)
        self._call = call

    def ask(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"X-Request-ID": f"request of {who}", "Content-Type": "application/json"}
        if who != "nobody":
            headers["Authorization"] = f"Bearer {who}"
        return self._call(self.app, method, path, headers=headers, **options)

    def submit(self, who: str) -> str:
        answer = self.ask(who, "POST", JOBS, json=BODY)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def submit_by_fal(self, who: str) -> str:
        return asyncio.run(submitted(self.services.jobs, owner=Owner(who, "fal"), model="m")).id


@pytest.fixture
def server(make_services: MakeServices, call: Call) -> Server:
    return Server(make_services, call)


@pytest.fixture
def open_server(make_services: MakeServices, call: Call) -> Server:
    return Server(make_services, call, open=True)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", UNLOAD),
        ("GET", UNLOAD),
        ("GET", OPERATOR),
        ("GET", f"{OPERATOR}/usage.csv"),
        ("DELETE", f"{OPERATOR}/jobs/{NO_JOB}"),
        ("PATCH", f"{OPERATOR}/jobs/{NO_JOB}"),
    ],
)
def test_the_routes_of_the_operator_need_the_role(
    server: Server, open_server: Server, method: str, path: str
) -> None:
    assert server.ask("nobody", method, path).status_code == 401
    for one in (server, open_server):
        for user in ("alice", "bob"):
            refused = one.ask(user, method, path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_required")
            assert "`operator`" in refused.json()["error"]["message"]
        assert one.lifecycle.unloaded == []
        assert one.ask("olga", method, path, json=LOW).status_code == (404 if NO_JOB in path else 200)
    assert open_server.ask("nobody", method, path, json=LOW).status_code == (404 if NO_JOB in path else 200)
    assert open_server.lifecycle.unloaded == (["m", "m"] if path == UNLOAD else [])


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "The JSON body: Invalid JSON: EOF while parsing a value at line 1 column 0.", None),
        (b"{}", "priority is required.", "priority"),
        (b'{"priority": "high"}', "priority: Input should be 'normal' or 'low'.", "priority"),
    ],
)
def test_an_error_over_a_body_says_what_is_wrong_with_it(
    server: Server, body: bytes, message: str, param: str | None
) -> None:
    answer = server.ask("olga", "PATCH", f"{OPERATOR}/jobs/{NO_JOB}", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (400, message, param)


def test_a_body_that_is_too_large_is_refused_by_its_size(server: Server) -> None:
    body = b'{"priority": "' + b"x" * server.services.config.limits.max_json_bytes + b'"}'
    answer = server.ask("olga", "PATCH", f"{OPERATOR}/jobs/{NO_JOB}", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_user_reaches_the_jobs_of_its_own_key_only(server: Server) -> None:
    job = server.submit("alice")
    server.submit("bob")
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", ""), ("POST", "/purge")):
        assert server.ask("bob", method, f"{JOBS}/{job}{path}").status_code == 404
    assert [one["id"] for one in server.ask("alice", "GET", JOBS).json()["data"]] == [job]
    assert server.ask("alice", "GET", f"{JOBS}/{job}").json()["status"] == "queued"


def test_an_operator_cancels_jobs_of_all_keys_and_apis(server: Server) -> None:
    job, other = server.submit("alice"), server.submit_by_fal("bob")
    for one, api in ((job, "images"), (other, "fal")):
        answer = server.ask("olga", "DELETE", f"{OPERATOR}/jobs/{one}")
        assert answer.status_code == 200, answer.text
        assert (answer.json()["state"], answer.json()["api"]) == ("cancelled", api)
    assert server.ask("alice", "GET", f"{JOBS}/{job}").json()["status"] == "cancelled"
    assert server.ask("olga", "GET", OPERATOR).json()["jobs"] == []


def test_an_operator_reads_no_images_of_other_keys(server: Server) -> None:
    job = server.submit("alice")
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", ""), ("POST", "/purge")):
        assert server.ask("olga", method, f"{JOBS}/{job}{path}").status_code == 404
    assert server.ask("olga", "GET", JOBS).json()["data"] == []


def test_an_operator_changes_the_order_of_the_queue(server: Server) -> None:
    first, second = server.submit("alice"), server.submit("bob")
    path = f"{OPERATOR}/jobs/{first}"
    assert server.ask("alice", "GET", f"{JOBS}/{first}").json()["queue_position"] == 0
    assert server.ask("olga", "PATCH", path, json=LOW).json()["priority"] == "low"
    assert server.ask("alice", "GET", f"{JOBS}/{first}").json()["queue_position"] == 1
    assert server.ask("olga", "PATCH", path, json={"priority": "normal"}).json()["priority"] == "normal"
    assert server.ask("olga", "DELETE", f"{OPERATOR}/jobs/{second}").status_code == 200
    refused = server.ask("olga", "PATCH", f"{OPERATOR}/jobs/{second}", json=LOW)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_is_not_queued")
    for body in ({"priority": "urgent"}, {}, LOW | {"state": "running"}):
        assert server.ask("olga", "PATCH", path, json=body).status_code == 400


def test_the_status_names_the_role_of_the_key(server: Server, open_server: Server) -> None:
    def role(one: Server, who: str) -> str:
        return str(one.ask(who, "GET", "/v1/internal/status").json()["role"])

    assert [role(server, who) for who in ("alice", "bob", "olga")] == ["user", "user", "operator"]
    assert [role(open_server, who) for who in ("alice", "nobody")] == ["user", "operator"]


def test_the_overview_shows_the_queue_and_the_files_and_no_prompt(server: Server) -> None:
    job = server.submit("alice")
    other = server.submit_by_fal("bob")
    asyncio.run(server.services.files.save(b"12345", "png"))
    asyncio.run(server.services.files.sweep())
    answer = server.ask("olga", "GET", OPERATOR)
    assert SECRET not in answer.text
    shown = answer.json()
    assert shown["models"] == {"m": {"prior": {"state": "ready", "replicas": 1}}}
    assert shown["replicas"] == [
        {
            "model": "m",
            "stage": "prior",
            "state": "ready",
            "device": "NVIDIA H200",
            "memory": {"allocated": 18, "free": 123},
        },
        {"model": "m", "stage": "decoder", "state": "loading"},
    ]
    assert all(one.pop("age_s") >= 0 for one in shown["jobs"])
    assert shown["jobs"] == [
        {
            "id": job,
            "key_id": "alice",
            "api": "images",
            "model": "m",
            "size": "512x512",
            "n": 2,
            "state": "queued",
            "cancelling": False,
            "priority": "normal",
        },
        {
            "id": other,
            "key_id": "bob",
            "api": "fal",
            "model": "m",
            "size": "512x512",
            "n": 1,
            "state": "queued",
            "cancelling": False,
            "priority": "normal",
        },
    ]
    assert shown["files"] == {"bytes": 5, "max_bytes": server.services.files.max_bytes}


def test_the_overview_shows_the_last_errors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()
    server.ask("nobody", "GET", "/v1/models")
    server.ask("alice", "POST", "/v1/images/generations", json=BODY | {"size": "7x7"})
    server.ask("bob", "GET", "/queue/fal-ai/m/requests/x/status")
    errors = server.ask("olga", "GET", OPERATOR).json()["errors"]
    assert all(began <= error.pop("at") <= time.time() for error in errors)
    assert errors == [
        {
            "request_id": "request of bob",
            "key_id": "bob",
            "api": "fal",
            "code": "job_not_found",
            "status": 404,
        },
        {
            "request_id": "request of alice",
            "key_id": "alice",
            "api": "openai",
            "code": "invalid_value",
            "status": 400,
        },
    ]
    for _ in range(recent.MAX_ERRORS):
        server.ask("alice", "GET", "/v1/nothing")
    errors = server.ask("olga", "GET", OPERATOR).json()["errors"]
    assert [error["code"] for error in errors] == ["not_found"] * recent.MAX_ERRORS


def test_an_error_of_the_server_is_shown_whoever_gets_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def fail(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.services.files, "size", fail)
    with pytest.raises(RuntimeError, match="broken"):
        server.ask("nobody", "GET", "/files/a.png")
    (error,) = server.ask("olga", "GET", OPERATOR).json()["errors"]
    assert (error["code"], error["status"], error["key_id"]) == ("server_error", 500, "")


def test_usage_counts_requests_and_jobs_that_have_succeeded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, today = server.services.jobs, day_of(time.time())

    async def made(key_id: str, n: int) -> None:
        job = await submitted(store, owner=Owner(key_id, "images"), work=3.5)
        await claimed(store)
        assert await store.finish("w", no_news(job), "succeeded", images=[IMAGE] * n)

    asyncio.run(made("bob", 1))
    asyncio.run(made("bob", 1))
    server.submit("alice")  # it has not ended
    for _ in range(2):
        assert server.ask("alice", "POST", "/v1/images/generations", json=BODY).status_code == 200
    assert server.ask("bob", "POST", "/v1/images/generations", json=BODY | {"size": "7x7"}).status_code == 400
    expected = [
        {"day": today, "key_id": "bob", "source": "jobs", "requests": 2, "images": 2, "megapixel_steps": 7.0},
        {
            "day": today,
            "key_id": "alice",
            "source": "requests",
            "requests": 2,
            "images": 4,
            "megapixel_steps": round(2 * 2 * 4 * 512 * 512 / 1e6, 3),
        },
    ]
    assert server.ask("olga", "GET", OPERATOR).json()["usage"] == expected
    table = server.ask("olga", "GET", f"{OPERATOR}/usage.csv")
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert rows == [{name: str(value) for name, value in row.items()} for row in expected]


def test_the_work_of_requests_is_kept_for_some_days(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = recent.Recent()
    facts = {"key_id": "alice", "size": (512, 512), "steps": 4, "n": 1}
    clock = SimpleNamespace(time=lambda: 0.0)
    monkeypatch.setattr(recent, "time", clock)
    kept.note_work(facts)
    assert list(kept.work) == [("1970-01-01", "alice")]
    clock.time = lambda: recent.DAYS * recent.DAY_S - 1.0
    kept.note_work(facts)
    assert list(kept.work) == [("1970-01-01", "alice"), ("1970-01-30", "alice")]
    clock.time = lambda: recent.DAYS * recent.DAY_S + 1.0
    kept.note_work(facts)
    assert list(kept.work) == [("1970-01-30", "alice"), ("1970-01-31", "alice")]
