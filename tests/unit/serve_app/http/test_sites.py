"""An open server answers no web page of another site, and no page that has taken over a name of its own."""

import socket

import pytest
from fastapi import FastAPI

from serve_app.http.application import create_app
from tests.unit.serve_app.http.conftest import Call, MakeServices

JOBS = "/v1/images/jobs"
UNLOAD = "/v1/internal/unload"


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return create_app(
        make_services(
            auth={"open": True, "allowed_hosts": ["Studio.test"]}, public_url="https://images.test/below"
        )
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", JOBS),
        ("DELETE", f"{JOBS}/a"),
        ("POST", UNLOAD),
        ("GET", UNLOAD),
        ("POST", "/fal-ai/glm-image"),
        ("POST", "/api/paas/v4/images/generations"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.test"},
        {"Origin": "http://localhost:9"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_page_of_another_site_changes_nothing(
    app: FastAPI, call: Call, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = call(app, method, path, headers=headers)
    assert (answer.status_code, "Pages of other sites" in answer.text) == (403, True)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}],
    ids=str,
)
def test_programs_and_the_servers_own_page_may_use_it(
    app: FastAPI, call: Call, headers: dict[str, str]
) -> None:
    answer = call(app, "POST", "/v1/images/generations", headers=headers, json={"prompt": "a boat"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:80", "localhost.evil.test", "127.0.0.1.evil.test", "", "[", "[::1"]
)
def test_a_name_that_leads_here_by_chance_is_refused(app: FastAPI, call: Call, host: str) -> None:
    """DNS rebinding: the page's own name leads to this machine, so that the browser sees one site."""
    for method, path in (("GET", JOBS), ("POST", JOBS), ("GET", "/v1/models")):
        answer = call(app, method, path, headers={"Host": host})
        assert (answer.status_code, "auth.allowed_hosts" in answer.text) == (403, True)
    assert call(app, "GET", "/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3"),
        *("images.test", "studio.test", socket.gethostname()),
    ],
)
def test_names_of_the_server_are_accepted(app: FastAPI, call: Call, host: str) -> None:
    assert call(app, "GET", "/v1/models", headers={"Host": host}).status_code == 200


def test_a_key_is_enough(make_services: MakeServices, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    app = create_app(make_services(auth={"open": True, "api_keys": [{"id": "a", "secret_env": "KEY"}]}))
    for host, origin in (("evil.test", "https://evil.test"), ("[", "http://[")):
        foreign = {"Host": host, "Origin": origin, "Authorization": "Bearer secret"}
        answer = call(app, "POST", "/v1/images/generations", headers=foreign, json={"prompt": "a boat"})
        assert answer.status_code == 200


def test_the_document_has_the_refusal_in_the_form_of_each_api(app: FastAPI, call: Call) -> None:
    paths = call(app, "GET", "/openapi.json").json()["paths"]
    closed = [
        operation["responses"]
        for operations in paths.values()
        for operation in operations.values()
        if "401" in operation["responses"]
    ]
    assert all(one["403"]["content"] == one["401"]["content"] for one in closed)
    assert len({str(one["403"]["content"]) for one in closed}) >= 4
    assert "403" not in paths["/health"]["get"]["responses"]
