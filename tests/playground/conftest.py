"""Fixtures for tests of the page in Chromium.

The server is one that is started as a user starts it, or one over stand-ins: see `stand_ins`.
"""

import base64
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Playwright, expect, sync_playwright

from deployments.families.glm_image import tiny
from tests.http.conftest import Endpoint
from tests.http.conftest import served as served_by_stand_ins
from tests.polling import until
from tests.serve.conftest import SMALL_SIZES, START_TIMEOUT_S, config_file, served, stages, tiny_model

WAIT_MS = 60_000
Z_IMAGE = tiny_model("z-image") | {"family": "z_image", "description": "It paints noise."}
SLOW: Any = {"num_inference_steps": 100, "size": "1024x1024"}
"""Fields of a request that takes long enough for actions while it runs."""
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="package")
def real_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with Ray. Its model `glm-image` is loaded, and its model `z-image` is not."""
    folder = tmp_path_factory.mktemp("playground")
    stay = {"min_replicas": 1}
    # Token by token, so that even this small prior runs long enough for its progress to be seen.
    prior = stay | {"speculation": "off"}
    models = [
        tiny_model("glm-image", checkpoint=str(tiny.cached(SMALL_SIZES)), prior=prior, decoder=stay),
        Z_IMAGE,
    ]
    with served(config_file(folder, models)) as running:
        until(lambda: "ready" in (now := stages(running.url)) and "loading" not in now, START_TIMEOUT_S)
        yield running.url


@contextmanager
def stand_ins(folder: Path, *models: dict[str, Any], **settings: Any) -> Iterator[Endpoint]:
    """Serves the page over stand-ins for the stages: it starts in a second, and images take less."""
    offered = list(models) or [tiny_model("glm-image"), Z_IMAGE]
    with served_by_stand_ins(folder, models=offered, **settings) as server:
        yield server


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """URL of a server over stand-ins without keys, which has no jobs yet."""
    with stand_ins(tmp_path) as server:
        yield server.url


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium"):
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


def chromium(playwright: Playwright) -> Browser:
    """Starts Chromium."""
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot use the sandbox
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)


@dataclass
class Visit:
    """A user who has the page open.

    Attributes:
        page: page in the browser.
        url: URL of the server.
        expected: parts of console messages that this test allows.
    """

    page: Page
    url: str
    expected: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Opens or reloads the page."""
        self.page.goto(self.url)
        self.page.locator("#generate:enabled").wait_for()

    def fill(self, prompt: str, size: str = "512x512", **fields: str | int) -> None:
        """Fills in the form. The default size is the small square."""
        page = self.page
        page.fill("#prompt", prompt)
        self.open_options()
        offered = page.locator(f'#shape-list [value="{size}"]')
        (offered if offered.count() else page.locator("[value=custom]")).check()
        if not offered.count():
            width, height = size.split("x")
            page.fill("#width", width)
            page.fill("#height", height)
        for name, value in fields.items():
            control = page.locator(f"[name={name}]")
            if control.evaluate("control => control.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill(str(value))

    def open_options(self) -> None:
        """Shows all fields of the form."""
        options = self.page.locator("#open-options")
        if options.is_visible() and options.get_attribute("aria-expanded") == "false":
            options.click()
        self.page.evaluate("document.querySelector('#more').open = true")

    def generate(self, prompt: str, size: str = "512x512", **fields: str | int) -> Locator:
        """Submits a request with a prompt that is unique on the page; returns its card."""
        self.fill(prompt, size, **fields)
        self.page.click("#generate")
        card = self.card(prompt)
        card.wait_for()
        return card

    def card(self, prompt: str) -> Locator:
        return self.page.locator("article").filter(has_text=prompt)

    def until(self, card: Locator, condition: Callable[[str], bool]) -> None:
        """Waits until the status text of a card, which begins with the phase, meets a condition."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not condition(words := card.locator(".words").inner_text()):
            assert time.monotonic() < deadline, words

    def file(self, card: Locator) -> bytes:
        """Waits for the first image, and returns its file."""
        card.locator(".open").first.wait_for()
        path = card.locator("img").first.get_attribute("src")
        return httpx.get(f"{self.url}/{path}").raise_for_status().content


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Visit]:
    """Visit in a new browser context. It must contact no other host and log nothing to the console."""
    with visiting(browser, url) as visit:
        visit.open()
        yield visit


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Visits the page, and checks its requests and console messages at the end."""
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    visit = Visit(context.new_page(), url)
    messages: list[str] = []
    requested: set[str] = set()

    def listen(message: ConsoleMessage) -> None:
        # The server deletes previews when the image is ready, possibly before the page has loaded them.
        if not ("404" in message.text and "/files/" in message.location["url"]):
            messages.append(f"{message.type}: {message.text}")

    visit.page.on("console", listen)
    visit.page.on("pageerror", lambda error: messages.append(str(error)))
    visit.page.on("request", lambda request: requested.add(request.url))
    yield visit
    context.close()
    assert [line for line in messages if not any(part in line for part in visit.expected)] == []
    assert [one for one in requested if not one.startswith((f"{url}/", "blob:"))] == []


def answered(url: str, prompt: str, seed: int, *sources: bytes, steps: int = 4, side: int = 512) -> bytes:
    """Returns the file that the API generates: a square, or an edit of the sources' size."""
    fields: dict[str, Any] = {
        "model": "glm-image",
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": steps,
        "response_format": "b64_json",
    }
    if sources:
        files = [("image[]", source) for source in sources]
        answer = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=120)
    else:
        answer = httpx.post(
            f"{url}/v1/images/generations", json=fields | {"size": f"{side}x{side}"}, timeout=120
        )
    return base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])


def picture(shade: int) -> bytes:
    """Returns a PNG file of one color."""
    file = io.BytesIO()
    Image.new("RGB", (512, 512), (shade, 0, 90)).save(file, "PNG")
    return file.getvalue()


DROP = """(text, [target, kind, name]) => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  data.items.add(new File([bytes], name, { type: kind }));
  const event = target === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  document.querySelector("#prompt").dispatchEvent(event);
}"""


def bring(visit: Visit, how: str, file: bytes, kind: str = "image/png", name: str = "boat.png") -> None:
    """Drops or pastes a file onto the page."""
    text = base64.b64encode(file).decode()
    visit.page.evaluate(f"([text, more]) => ({DROP})(text, more)", [text, [how, kind, name]])
