"""Tests of the page in a browser with a real server: requests from sending to the finished image."""

import re

import httpx
import pytest
from playwright.sync_api import Browser, Dialog, expect

from tests.playground.conftest import SLOW, Visit, answered, bring, picture, visiting
from tests.playground.line import Line

pytestmark = pytest.mark.slow


@pytest.fixture
def url(real_url: str) -> str:
    return real_url


def test_a_card_shows_the_progress_of_its_image(visit: Visit) -> None:
    card = visit.generate("a boat that is watched", num_inference_steps=60, size="1024x1024", seed=7)
    read_card = """card => [
      card.querySelector("progress").value,
      card.querySelector(".words").innerText,
      card.querySelector("img").getAttribute("src"),
      card.dataset.state,
    ]"""
    seen = []
    while (now := card.evaluate(read_card))[-1] == "running":
        seen.append(now)
    assert now[-1] == "made"
    values = [value for value, *_ in seen]
    assert values == sorted(values)
    assert len({value for value in values if value < 0.5}) > 3
    assert len({value for value in values if value > 0.5}) > 3
    words = {words for _, words, *_ in seen}
    assert any(re.match(r"Planning [0-9]+ % · [0-9]+ s$", one) for one in words)
    assert any(re.match(r"Painting [0-9]+ of 60, about [0-9]+ s left$", one) for one in words)
    assert len({preview for *_, preview, _ in seen if preview}) > 1
    expect(card.locator(".words")).to_have_text(re.compile("^glm-image · 1024×1024 · seed 7 · [0-9]+ s$"))
    assert visit.file(card) == answered(visit.url, "a boat that is watched", 7, steps=60, side=1024)
    width = card.locator("img").evaluate("async image => { await image.decode(); return image.naturalWidth }")
    assert width == 1024


def test_cancelling_stops_the_job(visit: Visit) -> None:
    card = visit.generate("a boat that is not wanted", **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".words")).to_have_text("Cancelled.")
    assert httpx.get(f"{visit.url}/v1/internal/status").json()["units"] == []
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)


def test_a_request_survives_reloads_and_lost_connections(browser: Browser, url: str) -> None:
    line = Line(int(url.rpartition(":")[2]))
    with line.running(), visiting(browser, f"http://127.0.0.1:{line.port}") as visit:
        visit.expected += ["net::ERR_"]
        visit.open()
        card = visit.generate("a boat in a storm", seed=5, **SLOW)
        visit.until(card, lambda words: words.startswith("Planning"))
        visit.open()  # a reload
        visit.until(card, lambda words: words.startswith(("Planning", "Painting")))
        line.cut()
        trouble = card.locator(".trouble")
        expect(trouble).to_have_text(re.compile("^The connection is lost."))
        line.mend()
        expect(trouble).to_be_empty()
        line.silence()
        expect(trouble).to_have_text(re.compile("^The connection is lost."))
        line.mend()
        visit.file(card)
    assert states(url, seed=5) == ["succeeded"]


def states(url: str, seed: int) -> list[str]:
    """Returns the statuses of the jobs with a seed. Each test that calls this has a seed of its own."""
    jobs = httpx.get(f"{url}/v1/images/jobs", params={"limit": 100}).json()["data"]
    return [job["status"] for job in jobs if job["seed"] == seed]


def test_many_requests_run_concurrently(visit: Visit) -> None:
    cards = [visit.generate(f"boat number {number:02}", seed=100 + number, **SLOW) for number in range(12)]
    visit.until(cards[-1], lambda words: words.startswith(("Queued behind ", "Next in the queue")))
    expect(visit.page.locator("#state")).to_have_text(re.compile("^Generating, [0-9]+ waiting$"))
    for card in reversed(cards[9:]):
        card.get_by_role("button", name="Cancel").click()
    for card in reversed(cards[:9]):
        visit.until(card, lambda words: words.startswith(("Planning", "Waiting to be painted", "Painting")))
        card.get_by_role("button", name="Cancel").click()
    for card in cards:
        expect(card.locator(".words")).to_have_text("Cancelled.")


def test_unloading_requires_a_confirmation_to_cancel_running_images(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 409"]
    card = visit.generate("a boat that is stopped", **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    page = visit.page
    page.click("#state")
    expect(page.locator("#server-doing")).to_have_text("Images in progress: 1.")
    asked: list[str] = []

    def answer(dialog: Dialog) -> None:
        asked.append(dialog.message)
        (dialog.dismiss if len(asked) == 1 else dialog.accept)()

    page.on("dialog", answer)
    page.click("#unload")
    expect(page.locator("#unload")).to_be_enabled()
    expect(card).to_have_attribute("data-state", "running")
    page.click("#unload")
    expect(page.locator("#unload")).to_be_enabled()
    assert asked == ["Unloading now makes running and waiting images fail. Unload?"] * 2
    page.keyboard.press("Escape")
    expect(card).to_have_attribute("data-state", "failed")
    expect(card.locator(".words")).to_contain_text("unload")
    expect(page.locator("#stages")).to_contain_text(re.compile("glm-imagepriorunloaded"))


def test_a_cold_start_is_shown_and_the_form_fits_the_model(visit: Visit) -> None:
    page = visit.page
    visit.open_options()
    expect(page.locator("[name=negative_prompt]")).to_be_hidden()
    page.select_option("[name=model]", "z-image")
    expect(page.locator("[name=negative_prompt]")).to_be_visible()
    expect(page.locator("[name=guidance_scale]")).to_have_attribute("placeholder", "4")
    page.fill("[name=guidance_scale]", "0")
    expect(page.locator("[name=negative_prompt]")).to_be_hidden()
    page.fill("[name=guidance_scale]", "")
    expect(page.locator("[name=strength]")).to_be_hidden()
    bring(visit, "drop", picture(50))
    expect(page.locator("[name=strength]")).to_be_visible()
    page.get_by_role("button", name="Remove boat.png").click()
    page.locator("[name=negative_prompt]").fill("fog")
    card = visit.generate("a boat that wakes a model", num_inference_steps=2, seed=1)
    visit.until(card, lambda words: words.startswith("Loading the model"))
    visit.file(card)
    card.locator(".open").click()
    expect(page.locator("#viewer-facts")).to_contain_text("negative promptfog")
    page.keyboard.press("Escape")
    page.click("#state")
    expect(page.locator("#stages")).to_contain_text(re.compile("z-imagepriorready"))
    page.click("#unload")
    expect(page.locator("#stages")).to_contain_text("z-imagepriorunloaded")
