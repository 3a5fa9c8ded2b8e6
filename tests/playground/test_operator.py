"""Tests of the operator's page, and of what the playground shows to keys of each role."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.conftest import needs_node
from tests.http.conftest import KEY, OTHER_KEY, Endpoint, keys
from tests.playground.conftest import SLOW, Z_IMAGE, Visit, stand_ins, visiting
from tests.playground.test_looks import SIZES, problems
from tests.polling import until
from tests.serve.conftest import tiny_model

pytestmark = pytest.mark.slow
PATH = "/v1/internal/operator"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Endpoint]:
    """A server with a key of each role."""
    with stand_ins(tmp_path, tiny_model("glm-image"), Z_IMAGE, auth=keys()) as server:
        yield server


def client(server: Endpoint, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"})


def enter(page: Page, key: str) -> None:
    """Enters a key on the operator's page."""
    page.fill("#key", key)
    page.get_by_role("button", name="Use key").click()


def submitted(server: Endpoint, key: str) -> str:
    """Submits a job that takes long; returns its id."""
    with client(server, key) as http:
        answer = http.post("/v1/images/jobs", json={"prompt": "nobody's business", "n": 10, **SLOW})
        return str(answer.raise_for_status().json()["id"])


def start(visit: Visit, key: str) -> None:
    """Opens the playground with a key in the tab."""
    visit.page.add_init_script(f"sessionStorage.setItem('api-key', '{key}')")
    visit.open()


@pytest.mark.parametrize(("key", "is_operator"), [(KEY, True), (OTHER_KEY, False)])
def test_the_playground_shows_what_the_role_of_the_key_allows(
    browser: Browser, keyed: Endpoint, key: str, *, is_operator: bool
) -> None:
    with visiting(browser, keyed.url) as visit:
        start(visit, key)
        expect(visit.page.locator("#state")).to_have_text("Ready")
        visit.page.click("#state")
        for control in ("#unload", "#operator"):
            expect(visit.page.locator(control)).to_be_visible(visible=is_operator)
        if is_operator:
            visit.page.click("#operator")
            expect(visit.page.locator("#stages tr")).to_have_count(4)
            visit.page.get_by_role("link", name="Playground").click()
            visit.page.locator("#generate:enabled").wait_for()


def test_the_page_asks_for_the_key_of_an_operator(browser: Browser, keyed: Endpoint) -> None:
    with visiting(browser, keyed.url) as visit:
        visit.expected += ["a status of 401", "a status of 403"]
        page = visit.page
        page.goto(f"{keyed.url}/operator")
        expect(page.locator("#problem")).to_contain_text("Send your API key")
        enter(page, OTHER_KEY)
        expect(page.locator("#problem")).to_contain_text("This needs a key with the role `operator`")
        enter(page, KEY)
        expect(page.locator("#stages tr")).to_have_count(4)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#problem")).to_be_empty()


def test_an_operator_sees_and_changes_the_work_of_all_keys(browser: Browser, keyed: Endpoint) -> None:
    running, first, second = submitted(keyed, KEY), submitted(keyed, OTHER_KEY), submitted(keyed, OTHER_KEY)
    with visiting(browser, keyed.url) as visit, client(keyed, OTHER_KEY) as http:
        visit.expected += ["a status of 401", "a status of 409"]
        page, jobs = visit.page, visit.page.locator("#jobs tr")
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{keyed.url}/operator")
        enter(page, KEY)
        expect(jobs).to_have_count(3)
        expect(jobs.nth(0)).to_contain_text("by-hash")
        expect(jobs.nth(1)).to_contain_text("by-variable")
        assert "nobody's business" not in page.content()
        until(lambda: queued(http, second))
        jobs.filter(has_text=second).locator("select").select_option("low")
        until(lambda: http.get(f"/v1/images/jobs/{second}").json()["priority"] == "low")
        jobs.filter(has_text=first).get_by_role("button", name="Cancel").click()
        until(lambda: http.get(f"/v1/images/jobs/{first}").json()["status"] == "cancelled")
        expect(jobs.filter(has_text=first)).to_have_count(0)
        page.route(
            "**/jobs/*", lambda route: route.fulfill(status=409, json={"error": {"message": "Too late."}})
        )
        jobs.filter(has_text=running).get_by_role("button", name="Cancel").click()
        expect(page.locator("#refusal")).to_have_text("Too late.")


def queued(http: httpx.Client, job: str) -> bool:
    return str(http.get(f"/v1/images/jobs/{job}").json()["status"]) == "queued"


def test_an_operator_sees_errors_usage_files_and_memory(browser: Browser, keyed: Endpoint) -> None:
    with client(keyed, OTHER_KEY) as http:
        body = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "response_format": "url"}
        http.post("/v1/images/generations", json=body).raise_for_status()
        refused = http.post("/v1/images/generations", json=body | {"size": "7x7"})
    with visiting(browser, keyed.url) as visit:
        visit.expected += ["a status of 401"]
        page = visit.page
        page.route(f"**{PATH}", lambda route: route.fulfill(json=with_memory(keyed)))
        page.goto(f"{keyed.url}/operator")
        expect(page.locator("#errors")).to_contain_text("invalid_value")
        expect(page.locator("#errors")).to_contain_text(refused.headers["x-request-id"])
        expect(page.locator("#usage")).to_contain_text("by-variable")
        expect(page.locator("#kept")).to_contain_text("of at most 21.5 GB")
        stages = page.locator("#stages tr")
        expect(stages.nth(0)).to_contain_text("NVIDIA H200: 19.5 GB of 150.1 GB, 128.0 GB free")
        expect(stages.nth(1)).to_contain_text("CPU: 740.0 MB; not loaded yet")
        page.evaluate("key => sessionStorage.setItem('api-key', key)", KEY)
        with page.expect_download() as downloading:
            page.click("#csv")
        with Path(downloading.value.path()).open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert (row["key_id"], row["source"], row["images"]) == ("by-variable", "requests", "1")


def with_memory(server: Endpoint) -> dict[str, Any]:
    """Returns the overview with replicas, which the stand-ins lack."""
    with client(server, KEY) as http:
        overview: dict[str, Any] = http.get(PATH).raise_for_status().json()
    gpu = {"allocated": 18e9, "reserved": 19.5e9, "free": 128e9, "total": 150.1e9}
    replicas: list[dict[str, Any]] = [
        {"stage": "prior", "device": "NVIDIA H200", "memory": gpu},
        {"stage": "decoder", "device": "CPU", "memory": {"resident": 740e6}},
        {"stage": "decoder"},
    ]
    return overview | {"replicas": [{"model": "glm-image", "state": "ready"} | one for one in replicas]}


@needs_node
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_accessible(browser: Browser, keyed: Endpoint, scheme: str, size: str) -> None:
    for key in (KEY, OTHER_KEY):
        submitted(keyed, key)
    with visiting(browser, keyed.url, color_scheme=scheme, viewport=SIZES[size]) as visit:
        visit.expected += ["a status of 401"]
        page = visit.page
        page.goto(f"{keyed.url}/operator")
        expect(page.locator("#problem")).not_to_be_empty()
        assert problems(page) == []
        enter(page, KEY)
        expect(page.locator("#jobs tr")).to_have_count(2)
        assert problems(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
