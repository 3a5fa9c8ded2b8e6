"""What somebody does who tries the server in a browser."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from tests.conftest import needs_node
from tests.playground.conftest import KEY, WAIT_MS, Visit, visiting
from tests.playground.line import Line
from tests.serve.conftest import until

pytestmark = pytest.mark.slow
SLOW: dict[str, str | int] = {"num_inference_steps": 100, "size": "1024x1024"}
"""Asks for an image that takes long enough for what is done meanwhile."""
expect.set_options(timeout=WAIT_MS)


def answered(url: str, prompt: str, seed: int, *sources: bytes, steps: int = 4, side: int = 512) -> bytes:
    """The file that the API answers with: a square, or as large as the source."""
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
    """Drop or paste a file onto the page."""
    text = base64.b64encode(file).decode()
    visit.page.evaluate(f"([text, more]) => ({DROP})(text, more)", [text, [how, kind, name]])


def test_an_image_is_watched_while_it_is_made(visit: Visit) -> None:
    card = visit.generate("a boat that is watched", num_inference_steps=60, size="1024x1024", seed=7)
    look = """card => [
      ...[...card.querySelectorAll("progress")].map((bar) => bar.value),
      card.querySelector(".words").innerText,
      card.querySelector("img").getAttribute("src"),
      card.dataset.state,
    ]"""
    seen = []
    while (now := card.evaluate(look))[-1] == "running":
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


def test_an_example_is_tried(visit: Visit) -> None:
    visit.page.locator(".example").nth(1).click()
    prompt = 'A bakery\'s shop front on a rainy evening, neon sign "FRESH BREAD"'
    expect(visit.page.locator("#prompt")).to_have_value(prompt)
    visit.until(visit.card(prompt), lambda words: not words.startswith("Sending"))
    visit.card(prompt).get_by_role("button", name="Cancel").click()
    expect(visit.card(prompt).locator(".words")).to_have_text("Cancelled.")


def test_several_images_come_together_and_stay_after_a_reload(visit: Visit) -> None:
    card = visit.generate("two boats", num_inference_steps=4, seed=3, n=2)
    visit.file(card)
    expect(card.locator(".tile")).to_have_count(2)
    visit.open()
    assert visit.file(card) == answered(visit.url, "two boats", 3)
    card.locator(".open").nth(1).click()
    expect(visit.page.locator("#viewer-facts")).to_contain_text("seed4")


def test_cancelling_stops_it(visit: Visit) -> None:
    card = visit.generate("a boat that is not wanted", **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".words")).to_have_text("Cancelled.")
    assert httpx.get(f"{visit.url}/v1/internal/status").json()["units"] == []
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    expect(visit.page.locator("#empty")).to_be_visible()


def test_it_goes_on_whatever_becomes_of_the_page(browser: Browser, url: str) -> None:
    line = Line(int(url.rpartition(":")[2]))
    with line.laid(), visiting(browser, f"http://127.0.0.1:{line.port}") as visit:
        visit.expected += ["net::ERR_"]
        visit.page.clock.install()
        visit.open()
        card = visit.generate("a boat in a storm", seed=5, **SLOW)
        visit.until(card, lambda words: words.startswith("Prior"))
        visit.open()  # once more
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


def test_what_cannot_be_sent_is_sent_again_by_itself(visit: Visit) -> None:
    visit.expected += ["net::ERR_INTERNET_DISCONNECTED"]
    visit.page.context.set_offline(True)
    card = visit.generate("a boat that waits for the network", num_inference_steps=4, seed=11)
    expect(card.locator(".trouble")).to_have_text(re.compile("^Not sent yet. The server cannot be reached."))
    visit.page.context.set_offline(False)
    assert visit.file(card) == answered(visit.url, "a boat that waits for the network", 11)


def test_what_is_cancelled_while_it_is_sent_is_not_made(visit: Visit) -> None:
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
    """Of the jobs with this seed, which one test alone uses."""
    jobs = httpx.get(f"{url}/v1/images/jobs", params={"limit": 100}).json()["data"]
    return [job["status"] for job in jobs if job["seed"] == seed]


@pytest.mark.parametrize("status", [401, 404, 429, 502])
def test_a_request_that_is_not_heard_of_for_a_while_is_not_lost(visit: Visit, status: int) -> None:
    visit.expected += [f"the server responded with a status of {status}"]
    body = {"error": {"message": "Not now.", "code": "not_now"}}
    visit.page.route("**/events", lambda route: route.fulfill(status=status, json=body))
    card = visit.generate(f"a boat behind a {status}", num_inference_steps=4)
    expect(card.locator(".trouble")).not_to_be_empty()
    visit.page.unroute("**/events")
    visit.open()
    visit.file(card)
    expect(card.locator(".trouble")).to_be_empty()


def test_many_requests_get_on_side_by_side(visit: Visit) -> None:
    """Browsers have six connections to a server; following that many jobs would leave none."""
    cards = [visit.generate(f"boat number {number:02}", seed=number, **SLOW) for number in range(12)]
    visit.until(cards[-1], lambda words: words.startswith(("Queued: ", "Next in the queue")))
    expect(visit.page.locator("#state-words")).to_have_text(re.compile("^Generating, [0-9]+ waiting$"))
    for card in reversed(cards[9:]):
        card.get_by_role("button", name="Cancel").click()
    for card in reversed(cards[:9]):
        visit.until(card, lambda words: words.startswith(("Prior", "Waiting for the decoder", "Painting")))
        card.get_by_role("button", name="Cancel").click()
    for card in cards:
        expect(card.locator(".words")).to_have_text("Cancelled.")


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_an_image_is_edited(visit: Visit, how: str) -> None:
    bring(visit, how, picture(200))
    expect(visit.page.get_by_alt_text("boat.png")).to_be_visible()
    expect(visit.page.locator("#generate")).to_have_text("Edit")
    card = visit.generate(f"make the boat blue by {how}", num_inference_steps=4, seed=2, size="")
    assert visit.file(card) == answered(visit.url, f"make the boat blue by {how}", 2, picture(200))
    visit.page.get_by_role("button", name="Remove boat.png").click()
    expect(visit.page.locator("#generate")).to_have_text("Generate")
    visit.open()
    card.get_by_role("button", name="Again").click()
    expect(visit.page.get_by_alt_text("boat.png")).to_be_visible()
    expect(visit.page.locator("#generate")).to_have_text("Edit")


def test_no_more_and_no_other_sources_are_taken_than_the_model_takes(visit: Visit) -> None:
    problem = visit.page.locator("#problem")
    bring(visit, "drop", b"words", "text/plain", "notes.txt")
    expect(problem).to_have_text("notes.txt is no PNG, JPEG or WebP image.")
    for shade in range(5):
        bring(visit, "drop", picture(shade), name=f"{shade}.png")
    expect(problem).to_have_text("This model takes 4 images at most.")
    expect(visit.page.locator("#source-list img")).to_have_count(4)
    description = visit.page.locator("#description")
    expect(description).to_be_hidden()
    visit.page.select_option("#model", "z-image")
    expect(description).to_have_text("It paints noise.")
    expect(description).to_be_visible()
    expect(visit.page.locator("#source-list img")).to_have_count(1)


def test_a_refused_request_says_why_at_its_field(visit: Visit) -> None:
    page = visit.page
    visit.expected += ["the server responded with a status of 400"]
    visit.file(visit.generate("a boat that is there already", num_inference_steps=2))
    visit.fill("a boat", size="custom", width=2048, height=2048, num_inference_steps=100, n=10)
    page.click("#generate")
    problem = page.locator("#problem")
    expect(problem).to_contain_text("megapixel")
    expect(page.locator("article")).to_have_count(1)
    at_fault = page.locator("[aria-invalid=true]")
    expect(at_fault).to_be_focused()
    page.fill("#n", "1")
    expect(problem).to_be_empty()
    expect(at_fault).to_have_count(0)
    page.locator("#width").press("Control+A")
    page.keyboard.type("520")  # which is no multiple of 32, so that the browser does not send it
    expect(page.locator("#width")).to_have_value("520")
    page.click("#generate")
    assert not page.locator("#width").evaluate("input => input.validity.valid")
    expect(page.locator("article")).to_have_count(1)


def test_a_cold_start_is_told_and_the_form_has_what_the_model_takes(visit: Visit) -> None:
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


def test_unloading_asks_before_it_stops_running_images(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 409"]
    card = visit.generate("a boat that is stopped", **SLOW)
    visit.until(card, lambda words: words.startswith("Painting"))
    page = visit.page
    page.click("#state")
    expect(page.locator("#server-doing")).to_have_text("Images: 1 being made.")
    page.click("#unload")
    expect(page.locator("#unload-problem")).not_to_be_empty()
    page.click("#unload-anyway")
    expect(page.locator("#unload-problem")).to_be_empty()
    page.keyboard.press("Escape")
    expect(card).to_have_attribute("data-state", "failed")
    expect(card.locator(".words")).to_contain_text("unload")
    expect(page.locator("#stages")).to_contain_text(re.compile("glm-imagepriorunloaded"))


def test_what_was_made_is_used_again_downloaded_and_deleted(visit: Visit) -> None:
    page = visit.page
    visit.expected += ["net::ERR_INTERNET_DISCONNECTED"]
    card = visit.generate("a boat for later", num_inference_steps=4, seed=8, output_format="webp")
    file = visit.file(card)
    path = card.locator("img").get_attribute("src")
    visit.fill("something else", num_inference_steps=9, seed=1, output_format="")
    card.locator(".open").click()
    with page.expect_download() as downloading:
        page.click("#download")
    assert downloading.value.suggested_filename == "image-8.webp"
    assert Path(downloading.value.path()).read_bytes() == file
    page.click("#viewer-again")
    for name, value in {"prompt": "a boat for later", "num_inference_steps": "4", "seed": "8"}.items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    expect(page.locator("#output_format")).to_have_value("webp")
    card.locator(".open").click()
    page.click("#use")
    expect(page.get_by_alt_text("image-8.webp")).to_be_visible()
    expect(page.locator("#generate")).to_have_text("Edit")
    page.on("dialog", lambda dialog: dialog.accept())
    page.context.set_offline(True)
    card.get_by_role("button", name="Delete").click()
    expect(card.locator(".trouble")).to_have_text(re.compile("^The server cannot be reached."))
    page.context.set_offline(False)
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert httpx.get(f"{visit.url}/{path}").status_code == 404
    visit.open()
    expect(page.locator("#empty")).to_be_visible()


def test_an_image_that_the_server_no_longer_has_says_so(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 404"]
    card = visit.generate("a boat that is gone", num_inference_steps=4)
    visit.file(card)
    (job, *_) = httpx.get(f"{visit.url}/v1/images/jobs").json()["data"]
    httpx.post(f"{visit.url}/v1/images/jobs/{job['id']}/purge").raise_for_status()
    visit.open()
    expect(card).to_contain_text("The server does not have it any more.")


RUN = {
    "curl": ["bash", "-c"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}


@needs_node
def test_each_request_is_shown_as_programs_that_make_the_same_image(visit: Visit, tmp_path: Path) -> None:
    prompt = "it's a \"boat\" & $HOME,\n'ünïcode'"
    card = visit.generate(prompt, num_inference_steps=4, seed=6, quality="low")
    programs(visit, tmp_path, visit.file(card))
    visit.page.keyboard.press("Escape")
    (tmp_path / "source-1.png").write_bytes(picture(10))
    visit.page.click("#key-button")
    visit.page.fill("#key", "of-no-use-on-an-open-server")
    visit.page.keyboard.press("Enter")
    visit.page.locator("#generate:enabled").wait_for()
    bring(visit, "drop", picture(10))
    card = visit.generate(f"@edit {prompt}", num_inference_steps=4, seed=6, n=2, size="")
    programs(visit, tmp_path, visit.file(card))


def programs(visit: Visit, folder: Path, file: bytes) -> None:
    """Run what the viewer of the newest image shows."""
    visit.page.locator(".open").first.click()
    modules = Path(__file__).parents[1] / "serve/js/node_modules"
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(modules)
    for language, command in RUN.items():
        visit.page.check(f"input[value={language}]")
        code = visit.page.locator("#code").inner_text()
        run = subprocess.run(
            [*command, code],
            cwd=folder,
            env=os.environ | {"API_KEY": "of no use"},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        urls = re.findall(r"http[^\s\"]*/files/[^\s\"]*", run.stdout)
        assert [httpx.get(one).content for one in urls] == [file], language


def test_it_is_all_done_by_keyboard(visit: Visit) -> None:
    page = visit.page

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if page.locator(selector).evaluate("element => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"{selector} is not reached")

    tab_to("#prompt")
    page.keyboard.type("a boat by keyboard")
    tab_to("#size")
    page.keyboard.type("Small")
    tab_to("#num_inference_steps")
    page.keyboard.type("4")
    tab_to("#generate")
    page.keyboard.press("Enter")
    card = visit.card("a boat by keyboard")
    visit.file(card)
    expect(page.locator("#announcements")).to_have_text("Ready: a boat by keyboard")
    expect(card.get_by_role("button", name="Open: a boat by keyboard")).to_be_visible()
    tab_to(".open")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    tab_to("#viewer-again")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(page.locator("article")).to_have_count(2)
    tab_to("article:first-child .again")


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, keyed: str) -> None:
    with visiting(browser, keyed) as visit:
        visit.expected += ["the server responded with a status of 401"]
        page = visit.page
        page.goto(keyed)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "another-one")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_have_text("The API key is not known here.")
        page.fill("#key", KEY)
        page.get_by_role("button", name="Use it").click()
        page.locator("#generate:enabled").wait_for()
        expect(page.locator("#state-words")).to_have_text("Asleep")
        card = visit.generate("a boat that cannot be made")
        visit.until(card, lambda words: words.startswith("Model loading failed"))
        card.get_by_role("button", name="Again").click()
        visit.open()  # once more, and it is not asked for
        expect(page.locator("#key-dialog")).to_be_hidden()
        assert KEY not in str(page.context.storage_state(indexed_db=True))
        page.click("#key-button")
        page.get_by_role("button", name="Forget it").click()
        # Browsers tell of a dialog's end a moment after it.
        until(lambda: page.evaluate("sessionStorage.getItem('api-key')") is None)
