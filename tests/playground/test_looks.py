"""Tests of accessibility, and of the layout at several sizes."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.conftest import needs_node
from tests.playground.conftest import SLOW, Visit, bring, picture, visiting

pytestmark = pytest.mark.slow
AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
SIZES: dict[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 720},
    "phone": {"width": 390, "height": 844},
}
IN_VIEW = """element => {
  const { left, top, right, bottom } = element.getBoundingClientRect();
  const seen = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
  return top >= 0 && bottom <= innerHeight && left >= 0 && right <= innerWidth && element.contains(seen);
}"""
"""Whether an element is in the window, and covered by no other."""


@pytest.mark.parametrize("size", SIZES)
def test_the_form_is_seen_without_scrolling(browser: Browser, url: str, size: str) -> None:
    with visiting(browser, url, viewport=SIZES[size]) as visit:
        visit.open()
        page = visit.page
        for selector in ("#prompt", "#generate"):
            assert page.locator(selector).evaluate(IN_VIEW), selector
        if size == "phone":
            assert page.locator("#prompt").evaluate("prompt => prompt.getBoundingClientRect().top > 700")
            page.click("#open-options")
        bring(visit, "drop", picture(1))
        for selector in ("#choose", "#shape-list", "[name=n]", "#more > summary"):
            assert page.locator(selector).evaluate(IN_VIEW), selector
        expect(page.locator("[name=seed]")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
        card = visit.generate("a boat", **SLOW)
        assert card.locator(".tile").evaluate(IN_VIEW)
        visit.file(card)
        for selector in (".open", ".words", ".actions"):
            assert card.locator(selector).evaluate(IN_VIEW), selector


@pytest.mark.parametrize("size", SIZES)
def test_a_refusal_is_seen(browser: Browser, url: str, size: str) -> None:
    """A refusal of a request, of a file and of a field, while the page shows something else."""
    with visiting(browser, url, viewport=SIZES[size]) as visit:
        visit.open()
        page, problem = visit.page, visit.page.locator("#problem")

        def see(words: str, field: str = "") -> None:
            expect(problem).to_contain_text(words)
            assert problem.evaluate(IN_VIEW)
            if field:
                expect(page.locator(f"{field}[aria-invalid=true]")).to_be_focused()
                assert page.locator(field).evaluate(IN_VIEW)

        bring(visit, "drop", b"words", "text/plain", "notes.txt")
        see("notes.txt is not a PNG, JPEG or WebP image.")
        page.click("#generate")
        see("Prompt: ", "#prompt")
        visit.fill("a boat", seed=-1)
        page.evaluate("document.querySelector('#more').open = false")
        page.click("#generate")
        see("Seed: ", "[name=seed]")
        page.fill("[name=seed]", "")
        bring(visit, "drop", b"no picture", name="broken.png")
        visit.expected += ["the server responded with a status of 400"]
        page.click("#generate")
        expect(page.locator("#files[aria-invalid=true]")).to_be_focused()
        assert problem.evaluate(IN_VIEW)
        expect(page.locator("article")).to_have_count(0)


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
    visit.open_options()
    assert problems(page) == []
    card = visit.generate(prompt, n=2, **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    assert problems(page) == []
    visit.file(card)
    assert problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    card.locator(".open").first.click()
    assert problems(page) == []
    assert page.locator("#viewer").evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
