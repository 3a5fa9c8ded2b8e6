"""Tests of the page in a browser: requests from sending to the finished image."""

import json
import re

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from tests.playground.conftest import SLOW, Visit, answered, bring, picture, visiting
from tests.playground.line import Line
from tests.polling import until

pytestmark = pytest.mark.slow


def test_a_card_shows_the_progress_of_its_image(visit: Visit) -> None:
    card = visit.generate("a boat that is watched", num_inference_steps=60, size="1024x1024", seed=7)
    read_card = """card => [
      ...[...card.querySelectorAll("progress")].map((bar) => bar.value),
      card.querySelector(".words").innerText,
      card.querySelector("img").getAttribute("src"),
      card.dataset.state,
    ]"""
    seen = []
    while (now := card.evaluate(read_card))[-1] == "running":
        seen.append(now)
    assert now[-1] == "made"
    for values in ([prior for prior, *_ in seen], [decoder for _, decoder, *_ in seen]):
        assert values == sorted(values)
        assert len(set(values)) > 3
    words = {words for _, _, words, *_ in seen}
    assert any(re.match(r"Prior: [0-9]+ of 1280 tokens · [0-9]+ s$", one) for one in words)
    assert any(re.match(r"Painting: step [0-9]+ of 60 · [0-9]+ s$", one) for one in words)
    assert len({preview for *_, preview, _ in seen if preview}) > 1
    expect(card.locator(".words")).to_have_text(re.compile("^glm-image · 1024×1024 · seed\\s7 · [0-9]+\\ss$"))
    assert visit.file(card) == answered(visit.url, "a boat that is watched", 7, steps=60, side=1024)
    width = card.locator("img").evaluate("async image => { await image.decode(); return image.naturalWidth }")
    assert width == 1024


def test_an_example_is_submitted(visit: Visit) -> None:
    visit.page.locator(".example").nth(1).click()
    prompt = 'A bakery\'s shop front on a rainy evening, neon sign "FRESH BREAD"'
    expect(visit.page.locator("#prompt")).to_have_value(prompt)
    visit.until(visit.card(prompt), lambda words: not words.startswith("Sending"))
    visit.card(prompt).get_by_role("button", name="Cancel").click()
    expect(visit.card(prompt).locator(".words")).to_have_text("Cancelled.")


def test_several_images_stay_after_a_reload(visit: Visit) -> None:
    card = visit.generate("two boats", num_inference_steps=4, seed=3, n=2)
    visit.file(card)
    expect(card.locator(".tile")).to_have_count(2)
    visit.open()
    assert visit.file(card) == answered(visit.url, "two boats", 3)
    card.locator(".open").nth(1).click()
    expect(visit.page.locator("#viewer-facts")).to_contain_text("seed4")


def test_cancelling_stops_the_job(visit: Visit) -> None:
    card = visit.generate("a boat that is not wanted", **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".words")).to_have_text("Cancelled.")
    assert httpx.get(f"{visit.url}/v1/internal/status").json()["units"] == []
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    expect(visit.page.locator("#empty")).to_be_visible()


def test_a_request_survives_reloads_and_lost_connections(browser: Browser, url: str) -> None:
    line = Line(int(url.rpartition(":")[2]))
    with line.running(), visiting(browser, f"http://127.0.0.1:{line.port}") as visit:
        visit.expected += ["net::ERR_"]
        visit.page.clock.install()
        visit.open()
        card = visit.generate("a boat in a storm", seed=5, **SLOW)
        visit.until(card, lambda words: words.startswith("Prior"))
        visit.open()  # a reload
        visit.until(card, lambda words: words.startswith(("Prior", "Painting")))
        line.cut()
        trouble = card.locator(".trouble")
        expect(trouble).to_have_text(re.compile("^The connection is lost."))
        line.mend()
        expect(trouble).to_be_empty()
        line.silence()
        visit.page.clock.fast_forward("01:00")
        expect(trouble).to_have_text(re.compile("^The connection is lost."))
        line.mend()
        visit.file(card)
    assert states(url, seed=5) == ["succeeded"]


def test_a_request_that_cannot_be_sent_is_retried(visit: Visit) -> None:
    visit.expected += ["net::ERR_INTERNET_DISCONNECTED"]
    visit.page.context.set_offline(True)
    card = visit.generate("a boat that waits for the network", num_inference_steps=4, seed=11)
    expect(card.locator(".trouble")).to_have_text(re.compile("^Not sent yet. The server cannot be reached."))
    visit.page.context.set_offline(False)
    assert visit.file(card) == answered(visit.url, "a boat that waits for the network", 11)


def test_a_request_that_is_cancelled_while_it_is_sent_is_not_run(visit: Visit) -> None:
    held: list[Route] = []
    visit.page.route("**/v1/images/jobs", lambda route: held.append(route))
    card = visit.generate("a boat that was a mistake", seed=13, **SLOW)
    until(lambda: bool(visit.page.title() and held))
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_have_count(0)
    held[0].continue_()
    until(lambda: states(visit.url, seed=13) == ["cancelled"])
    visit.open()
    expect(visit.page.locator("#empty")).to_be_visible()


def states(url: str, seed: int) -> list[str]:
    """Returns the statuses of the jobs with a seed. Each test that calls this has a seed of its own."""
    jobs = httpx.get(f"{url}/v1/images/jobs", params={"limit": 100}).json()["data"]
    return [job["status"] for job in jobs if job["seed"] == seed]


@pytest.mark.parametrize("status", [401, 404, 429, 502])
def test_errors_of_the_event_stream_do_not_lose_a_request(visit: Visit, status: int) -> None:
    visit.expected += [f"the server responded with a status of {status}"]
    body = {"error": {"message": "Not now.", "code": "not_now"}}
    visit.page.route("**/events", lambda route: route.fulfill(status=status, json=body))
    card = visit.generate(f"a boat behind a {status}", num_inference_steps=4)
    expect(card.locator(".trouble")).to_contain_text("Request not found." if status == 404 else "Not now.")
    visit.page.unroute("**/events")
    visit.open()
    visit.file(card)
    expect(card.locator(".trouble")).to_be_empty()


def test_a_card_says_what_its_job_waits_for(visit: Visit) -> None:
    job = {
        "id": "0190163d-8694-739b-aea5-966c26f8ad91",
        "status": "queued",
        "model": "glm-image",
        "created_at": 0,
        "waiting_for": "It waits for the server's file storage.",
    }
    visit.page.route("**/events", lambda route: route.fulfill(body=f"data: {json.dumps(job)}\n\n"))
    card = visit.generate("a boat without room", num_inference_steps=4)
    expect(card.locator(".words")).to_contain_text("It waits for the server's file storage.")
    visit.page.unroute("**/events")
    visit.file(card)


def test_many_requests_run_concurrently(visit: Visit) -> None:
    """A browser opens six connections to a server. Following six jobs would use them all."""
    cards = [visit.generate(f"boat number {number:02}", seed=100 + number, **SLOW) for number in range(12)]
    visit.until(cards[-1], lambda words: words.startswith(("Queued: ", "Next in the queue")))
    expect(visit.page.locator("#state-words")).to_have_text(re.compile("^Generating, [0-9]+ waiting$"))
    for card in reversed(cards[9:]):
        card.get_by_role("button", name="Cancel").click()
    for card in reversed(cards[:9]):
        visit.until(card, lambda words: words.startswith(("Prior", "Waiting for the decoder", "Painting")))
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
    page.click("#unload")
    expect(page.locator("#unload-problem")).not_to_be_empty()
    page.click("#unload-anyway")
    expect(page.locator("#unload-problem")).to_be_empty()
    page.keyboard.press("Escape")
    expect(card).to_have_attribute("data-state", "failed")
    expect(card.locator(".words")).to_contain_text("unload")
    expect(page.locator("#stages")).to_contain_text(re.compile("glm-imagepriorunloaded"))


def test_a_cold_start_is_shown_and_the_form_fits_the_model(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#negative_prompt")).to_be_hidden()
    page.select_option("#model", "z-image")
    expect(page.locator("#negative_prompt")).to_be_visible()
    expect(page.locator("#guidance_scale")).to_have_attribute("placeholder", "4")
    page.fill("#guidance_scale", "0")
    expect(page.locator("#negative_prompt")).to_be_hidden()
    page.fill("#guidance_scale", "")
    expect(page.locator("#strength")).to_be_hidden()
    bring(visit, "drop", picture(50))
    expect(page.locator("#strength")).to_be_visible()
    page.get_by_role("button", name="Remove boat.png").click()
    page.locator("#negative_prompt").fill("fog")
    card = visit.generate("a boat that wakes a model", num_inference_steps=2, seed=1)
    visit.until(card, lambda words: words.startswith("Loading the model, which was not in memory: prior "))
    visit.file(card)
    card.locator(".open").click()
    expect(page.locator("#viewer-facts")).to_contain_text("negative promptfog")
    page.keyboard.press("Escape")
    page.click("#state")
    expect(page.locator("#stages")).to_contain_text(re.compile("z-imagepriorready"))
    page.click("#unload")
    expect(page.locator("#stages")).to_contain_text("z-imagepriorunloaded")
