"""Tests of the API reference in a browser: requests with a key, links to it and in it, accessibility."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.conftest import needs_node
from tests.http.conftest import KEY, Endpoint, keys
from tests.playground.conftest import Z_IMAGE, stand_ins, visiting
from tests.playground.test_looks import SIZES, problems
from tests.serve.conftest import tiny_model

pytestmark = pytest.mark.slow
PREFIX = "/below/img"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Endpoint]:
    """A server that requires a key."""
    with stand_ins(tmp_path, tiny_model("glm-image"), Z_IMAGE, auth=keys()) as server:
        yield server


def authorize(page: Page) -> None:
    """Enters the key."""
    page.get_by_role("button", name="Authorize").click()
    dialog = page.get_by_role("dialog")
    dialog.locator("#auth-bearer-value").fill(KEY)
    dialog.get_by_role("button", name="Authorize").first.click()
    dialog.get_by_role("button", name="Close").first.click()


def tried(page: Page, operation: str) -> Locator:
    """Opens an operation with the tag OpenAI, and lets the user try it."""
    block = page.locator(f"#operations-OpenAI-{operation}")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def execute(block: Locator) -> None:
    """Sends the request, and waits until its answer with status 200 is shown."""
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")


def test_a_request_with_a_key_succeeds_and_so_does_the_curl_that_is_shown(
    browser: Browser, keyed: Endpoint
) -> None:
    paths = httpx.get(f"{keyed.url}/openapi.json").json()["paths"]
    with visiting(browser, keyed.url) as visit:
        page = visit.page
        page.goto(f"{keyed.url}/docs")
        expect(page.locator(".opblock")).to_have_count(sum(map(len, paths.values())))
        authorize(page)
        block = tried(page, "list_models")
        execute(block)
        expect(block.locator(".live-responses-table")).to_contain_text('"id": "glm-image"')
        shown = block.locator(".curl-command pre").inner_text()
        printed = subprocess.run(["sh", "-c", shown], check=True, capture_output=True, timeout=60).stdout
        assert b'"id":"glm-image"' in printed
        assert page.url.endswith("/docs#/OpenAI/list_models")
        page.goto(f"{keyed.url}/docs#/Operator/operator_change_by_patch")
        page.reload()
        operation = page.locator("#operations-Operator-operator_change_by_patch")
        expect(operation).to_have_class(re.compile("is-open"))
        expect(operation).to_be_in_viewport()


def test_the_playground_leads_to_it_below_a_prefix_that_a_proxy_adds(
    browser: Browser, keyed: Endpoint
) -> None:
    sent: list[str] = []

    def forward(route: Route) -> None:
        sent.append(route.request.url)
        route.fulfill(response=route.fetch(url=route.request.url.replace(PREFIX, "")))

    with visiting(browser, keyed.url) as visit:
        page = visit.page
        page.add_init_script(f"sessionStorage.setItem('api-key', '{KEY}')")
        page.route(f"{keyed.url}{PREFIX}/**", forward)
        page.goto(f"{keyed.url}{PREFIX}/")
        page.click("#state")
        page.get_by_role("link", name="API reference").click()
        block = tried(page, "list_models")
        sent.clear()
        execute(block)  # the key is the playground's
        assert page.url == f"{keyed.url}{PREFIX}/docs#/OpenAI/list_models"
        assert f"{keyed.url}{PREFIX}/v1/models" in sent
        page.get_by_role("link", name="Playground").click()
        page.locator("#generate:enabled").wait_for()


@needs_node
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(browser: Browser, keyed: Endpoint, scheme: str) -> None:
    with visiting(browser, keyed.url, color_scheme=scheme, reduced_motion="reduce") as visit:
        page = visit.page
        page.goto(f"{keyed.url}/docs")
        page.locator(".opblock").first.wait_for()
        assert problems(page) == []
        page.set_viewport_size(SIZES["phone"])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size(SIZES["desktop"])
        page.get_by_role("button", name="Authorize").click()
        assert problems(page) == []
        page.get_by_role("button", name="Close").first.click()
        block = tried(page, "edits")
        block.locator(".content-type").first.select_option("multipart/form-data")
        block.locator("input[type=file]").or_(block.get_by_text("Add string item")).first.wait_for()
        assert problems(page) == []
        dark = page.evaluate("document.documentElement.classList.contains('dark-mode')")
        assert dark == (scheme == "dark")
