"""The page in a real browser, Debian's Chromium, against a server as a user starts it."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Playwright, sync_playwright

from deployments.families.glm_image import tiny
from tests.serve.conftest import SMALL_SIZES, START_TIMEOUT_S, config_file, served, stages, tiny_model, until

WAIT_MS = 60_000


@pytest.fixture(scope="package")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an open server. Its model `glm-image` is loaded, its model `z-image` is not."""
    folder = tmp_path_factory.mktemp("playground")
    stay = {"min_replicas": 1}
    models = [
        tiny_model("glm-image", checkpoint=str(tiny.cached(SMALL_SIZES)), prior=stay, decoder=stay),
        tiny_model("z-image") | {"family": "z_image", "description": "It paints noise."},
    ]
    with served(config_file(folder, models)) as running:
        until(lambda: "ready" in (now := stages(running.url)) and "loading" not in now, START_TIMEOUT_S)
        yield running.url


KEY = "key-of-the-browser"


@pytest.fixture(scope="package")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that wants a key, and whose model cannot be loaded."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = [{"id": "browser", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]
    models = [tiny_model("broken", checkpoint=str(folder / "nowhere"))]
    with served(config_file(folder, models, auth={"api_keys": keys})) as running:
        yield running.url


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium"):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


def chromium(playwright: Playwright) -> Browser:
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox is not for root
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)


@dataclass
class Visit:
    """Somebody who has the page open.

    Attributes:
        page: what they see.
        url: of the server.
        expected: what the console may say in this test: a part of the line.
    """

    page: Page
    url: str
    expected: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.locator("#generate:enabled").wait_for()

    def fill(self, prompt: str, **fields: str | int) -> None:
        """Fill in the form, the small square unless another size is given."""
        self.page.fill("#prompt", prompt)
        for name, value in {"size": "512x512", **fields}.items():
            control = self.page.locator(f"#{name}")
            if control.evaluate("control => control.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill(str(value))

    def generate(self, prompt: str, **fields: str | int) -> Locator:
        """Ask for an image by a prompt that no other request has; returns its card."""
        self.fill(prompt, **fields)
        self.page.click("#generate")
        card = self.card(prompt)
        card.wait_for()
        return card

    def card(self, prompt: str) -> Locator:
        return self.page.locator("article").filter(has_text=prompt)

    def until(self, card: Locator, condition: Callable[[str], bool]) -> None:
        """Wait until the words on a card, of which the first say what is done, meet a condition."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not condition(words := card.locator(".words").inner_text()):
            assert time.monotonic() < deadline, words

    def file(self, card: Locator) -> bytes:
        """Of the first image, once it has been made."""
        card.locator(".open").first.wait_for()
        path = card.locator("img").first.get_attribute("src")
        return httpx.get(f"{self.url}/{path}").raise_for_status().content


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    """With a browser that remembers nothing. It asks no other host, and its console stays empty."""
    with visiting(browser, url) as visit:
        visit.open()
        yield visit


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    visit = Visit(context.new_page(), url)
    said: list[str] = []
    asked: set[str] = set()

    def listen(message: ConsoleMessage) -> None:
        # A preview may be gone when it is asked for, since the image is there.
        if not ("404" in message.text and "/files/" in message.location["url"]):
            said.append(f"{message.type}: {message.text}")

    visit.page.on("console", listen)
    visit.page.on("pageerror", lambda error: said.append(str(error)))
    visit.page.on("request", lambda request: asked.add(request.url))
    yield visit
    context.close()
    assert [line for line in said if not any(part in line for part in visit.expected)] == []
    assert [one for one in asked if not one.startswith((f"{url}/", "blob:"))] == []
