"""Takes screenshots of the pages at several sizes, light and dark. One is in the README.

`python -m tests.playground.screenshots FOLDER`
"""

import argparse
import tempfile
from pathlib import Path

import httpx
from playwright.sync_api import ViewportSize, sync_playwright

from tests.demo.conftest import CONFIG, demo_config
from tests.playground.conftest import Visit, chromium, visiting
from tests.serve.conftest import served

SIZES: dict[str, ViewportSize] = {
    "laptop": {"width": 1366, "height": 650},
    "desktop": {"width": 1440, "height": 900},
    "phone": {"width": 390, "height": 844},
}


def take(visit: Visit, name: Path) -> None:
    """Takes the screenshots of one visit."""

    def shot(view: str) -> None:
        visit.page.screenshot(path=f"{name}-{view}.png")

    jobs = f"{visit.url}/v1/images/jobs"
    for job in httpx.get(jobs).json()["data"]:  # of the visit before
        httpx.post(f"{jobs}/{job['id']}/purge").raise_for_status()
    visit.open()
    shot("empty")
    for prompt in ("A purple square on a white background", "A small red star above a blue circle on yellow"):
        visit.file(visit.generate(prompt))
    card = visit.generate("A green triangle to the left of an orange star", num_inference_steps=30)
    visit.page.evaluate("document.querySelector('#more').open = false")
    visit.until(card, lambda words: words.startswith("Planning"))
    shot("prior")
    card.get_by_alt_text("Preview").wait_for()
    shot("preview")
    visit.file(card)
    visit.page.click("#state")
    shot("server")
    visit.page.keyboard.press("Escape")
    visit.page.locator(".open").first.click()
    shot("viewer")
    visit.page.goto(f"{visit.url}/operator")
    visit.page.locator("#usage tr").first.wait_for()
    shot("operator")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as kept,
        served(demo_config(Path(kept), CONFIG)) as running,
        sync_playwright() as playwright,
    ):
        browser = chromium(playwright)
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                with visiting(browser, running.url, color_scheme=scheme, viewport=viewport) as visit:
                    take(visit, folder / f"{size}-{scheme}")
        browser.close()


if __name__ == "__main__":
    main()
