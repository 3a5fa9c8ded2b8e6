"""Tests of accessibility and of the layout on small screens."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.conftest import needs_node
from tests.playground.conftest import Visit, visiting

pytestmark = pytest.mark.slow
AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
SIZES = {"desktop": {"width": 1280, "height": 860}, "phone": {"width": 360, "height": 740}}


def problems(page: Page) -> list[str]:
    """Returns the violations that axe reports: https://github.com/dequelabs/axe-core/blob/develop/doc/rule-descriptions.md."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    found: dict[str, Any] = page.evaluate("axe.run({ resultTypes: ['violations'] })")
    return [f"{one['id']}: {[node['html'] for node in one['nodes']]}" for one in found["violations"]]


@needs_node
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_accessible(browser: Browser, url: str, scheme: str, size: str) -> None:
    with visiting(browser, url, color_scheme=scheme, viewport=SIZES[size]) as visit:
        visit.open()
        assert problems(visit.page) == []
        check_all_parts(visit, f"boats in {scheme}, at {size} size")


def check_all_parts(visit: Visit, prompt: str) -> None:
    """Opens every part of the page, and checks it for accessibility problems."""
    page = visit.page
    page.click("#state")
    assert problems(page) == []
    page.keyboard.press("Escape")
    page.click("#key-button")
    assert problems(page) == []
    page.keyboard.press("Escape")
    card = visit.generate(prompt, num_inference_steps=30, n=2)
    visit.until(card, lambda words: words.startswith("Painting"))
    assert problems(page) == []
    visit.file(card)
    assert problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    card.locator(".open").first.click()
    assert problems(page) == []
    assert page.locator("#viewer").evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
