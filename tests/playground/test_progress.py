"""Tests of the page in a browser: what it says about the progress, and what it survives."""

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Route, expect

from tests.playground.conftest import SLOW, Visit, answered
from tests.polling import until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("status", [401, 404, 429, 502])
def test_errors_of_polling_do_not_lose_a_request(visit: Visit, status: int) -> None:
    visit.expected += [f"the server responded with a status of {status}"]
    body = {"error": {"message": "Not now.", "code": "not_now"}}
    visit.page.route("**/jobs/*", lambda route: route.fulfill(status=status, json=body))
    card = visit.generate(f"a boat behind a {status}", num_inference_steps=4)
    expect(card.locator(".trouble")).to_contain_text("Request not found." if status == 404 else "Not now.")
    visit.page.unroute("**/jobs/*")
    if status == 404:  # the page does not ask again
        visit.open()
    visit.file(card)
    expect(card.locator(".trouble")).to_be_empty()


def test_a_card_says_what_its_job_waits_for(visit: Visit) -> None:
    job = {
        "id": "0190163d-8694-739b-aea5-966c26f8ad91",
        "status": "queued",
        "model": "glm-image",
        "created_at": 0,
        "size": "512x512",
        "waiting_for": "It waits for the server's file storage.",
    }
    visit.page.route("**/jobs/*", lambda route: route.fulfill(json=job))
    card = visit.generate("a boat without room", num_inference_steps=4)
    expect(card.locator(".words")).to_contain_text("It waits for the server's file storage.")
    visit.page.unroute("**/jobs/*")
    visit.file(card)


def test_several_images_stay_after_a_reload(visit: Visit) -> None:
    card = visit.generate("two boats", num_inference_steps=4, seed=3, n=2)
    visit.file(card)
    expect(card.locator(".tile")).to_have_count(2)
    visit.open()
    assert visit.file(card) == answered(visit.url, "two boats", 3)
    card.locator(".open").nth(1).click()
    expect(visit.page.locator("#viewer-facts")).to_contain_text("seed4")


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
    until(lambda: states(visit.url) == ["cancelled"])
    visit.open()
    expect(visit.page.locator("#empty")).to_be_visible()


def states(url: str) -> list[str]:
    return [job["status"] for job in httpx.get(f"{url}/v1/images/jobs").json()["data"]]


def running(*images: tuple[str, int, int]) -> dict[str, Any]:
    """Returns a job with the progress of each image."""
    progress = [{"stage": stage, "done": done, "total": total} for stage, done, total in images]
    job = {"id": "an-id", "status": "running", "model": "glm-image", "created_at": 0, "size": "512x512"}
    return job | {"images": progress}


class Answers:
    """Answers of the job's route, which a test sets instead of the server's."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.job: dict[str, Any] = running(("waiting", 0, 0))
        visit.page.route("**/jobs/*", lambda route: route.fulfill(json=self.job))

    def release(self) -> None:
        self.visit.page.unroute("**/jobs/*")


def test_the_progress_is_told_in_words_and_in_the_title(visit: Visit) -> None:
    page, answers = visit.page, Answers(visit)
    card = visit.generate("a boat in words", num_inference_steps=4, n=2)
    words = card.locator(".words")

    def see(text: str) -> None:
        expect(words).to_have_text(re.compile(text))
        title = f"{words.inner_text().split(' · ')[0]} · GLM-Image"
        assert re.match(text, title)
        expect(page).to_have_title(re.compile(text.removesuffix("$")))

    see("^Waiting for a free place")
    answers.job = running(("prior", 26, 100), ("waiting", 0, 0))
    see(r"^Planning 26 % \(image 1 of 2\)")
    expect(page.locator("#announcements")).to_have_text("Planning: a boat in words")
    answers.job = running(("decoder", 0, 8), ("prior", 26, 100))
    see(r"^Painting 0 of 8 \(image 1 of 2\)")
    page.wait_for_timeout(1000)
    answers.job = running(("decoder", 3, 8), ("prior", 26, 100))
    see(r"^Painting 3 of 8 \(image 1 of 2\), about [0-9]+ s left")
    answers.job = running(("decoder", 8, 8), ("prior", 26, 100))
    see(r"^Planning 26 % \(image 2 of 2\)")
    answers.release()
    visit.file(card)
    expect(page).to_have_title("GLM-Image playground")


def test_a_percentage_of_loading_is_shown_only_while_it_grows(visit: Visit) -> None:
    page = visit.page
    health = httpx.get(f"{visit.url}/health").json()
    share = 0.2

    def answer(route: Route) -> None:
        health["models"]["glm-image"]["prior"] = {"state": "loading", "progress": share}
        route.fulfill(json=health)

    page.clock.install()
    page.route("**/health", answer)
    answers = Answers(visit)
    visit.open()
    words = visit.generate("a boat that waits", num_inference_steps=4).locator(".words")
    expect(words).to_have_text(re.compile("^Loading the model ·"))
    share = 0.5
    expect(words).to_have_text(re.compile("^Loading the model 75 % ·"))
    page.clock.fast_forward("00:30")
    expect(words).to_have_text(re.compile("^Loading the model ·"))
    answers.release()


HIDE = """() => {
  Object.defineProperty(document, "hidden", { get: () => true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
NOTIFICATIONS = """
  window.shown = [];
  window.Notification = class {
    static permission = "default";
    static async requestPermission() { this.permission = "granted"; }
    constructor(title, { body }) { window.shown.push([title, body]); }
  };
"""


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_the_end_of_a_long_run_is_notified(visit: Visit, allowed: bool, hidden: bool) -> None:
    page = visit.page
    page.add_init_script(NOTIFICATIONS)
    page.clock.install()
    answers = Answers(visit)
    visit.open()
    card = visit.generate("a boat that takes long", num_inference_steps=4)
    expect(card.locator(".words")).to_have_text(re.compile("^Waiting for a free place"))
    if allowed:
        card.get_by_role("button", name="Notify me").click()
        expect(card.get_by_role("button", name="Notify me")).to_be_hidden()
    if hidden:
        page.evaluate(HIDE)
    page.clock.fast_forward("00:30")
    answers.release()
    visit.file(card)
    shown = [["Ready", "a boat that takes long"]] if allowed and hidden else []
    assert page.evaluate("shown") == shown


def test_a_short_run_is_not_notified(visit: Visit) -> None:
    page = visit.page
    page.add_init_script(NOTIFICATIONS + "Notification.permission = 'granted';")
    visit.open()
    card = visit.generate("a boat that is quick", num_inference_steps=4)
    expect(card.get_by_role("button", name="Notify me")).to_be_hidden()
    page.evaluate(HIDE)
    visit.file(card)
    assert page.evaluate("shown") == []


def test_a_restart_of_the_server_loses_nothing(visit: Visit) -> None:
    """While it restarts, the proxy answers everything with a 404 of its own."""
    visit.expected += ["the server responded with a status of 404"]
    page = visit.page
    made = visit.generate("a boat that is there", num_inference_steps=4)
    visit.file(made)
    card = visit.generate("a boat in the making", num_inference_steps=4, size="1024x1024", seed=5)
    pattern = re.compile("/(v1/images/jobs|files)/")
    page.route(pattern, lambda route: route.fulfill(status=404, body="Path '/' not found."))
    expect(card.locator(".trouble")).to_have_text(re.compile("^The connection is lost."))
    page.route("**/jobs", lambda route: route.fulfill(status=404, body="Path '/' not found."))
    late = visit.generate("a boat of a later time", num_inference_steps=4)
    expect(late.locator(".trouble")).to_have_text(re.compile("^Not sent yet."))
    page.unroute(pattern)
    page.unroute("**/jobs")
    for one in (card, late):
        visit.file(one)
        expect(one.locator(".trouble")).to_be_empty()
    assert sorted(states(visit.url)) == ["succeeded"] * 3


def test_an_image_that_is_not_loaded_is_loaded_later(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 404"]
    card = visit.generate("a boat behind a proxy", num_inference_steps=4)
    visit.file(card)
    visit.page.route("**/files/*", lambda route: route.fulfill(status=404, body="Path '/' not found."))
    visit.open()
    expect(card).to_contain_text("The image could not be loaded.")
    visit.page.unroute("**/files/*")
    expect(card).not_to_contain_text("The image could not be loaded.")
    expect(card.locator(".open")).to_be_visible()
