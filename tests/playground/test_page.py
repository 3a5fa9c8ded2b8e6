"""Tests of the page in a browser: source images, form, viewer, keyboard and API key."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from serve_app import __version__
from tests.conftest import needs_node
from tests.playground.conftest import KEY, Visit, answered, bring, picture, visiting
from tests.polling import until

pytestmark = pytest.mark.slow


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


def test_unsupported_sources_and_too_many_are_rejected(visit: Visit) -> None:
    problem = visit.page.locator("#problem")
    bring(visit, "drop", b"words", "text/plain", "notes.txt")
    expect(problem).to_have_text("notes.txt is not a PNG, JPEG or WebP image.")
    for shade in range(5):
        bring(visit, "drop", picture(shade), name=f"{shade}.png")
    expect(problem).to_have_text("This model accepts at most 4 images.")
    expect(visit.page.locator("#source-list img")).to_have_count(4)
    description = visit.page.locator("#description")
    expect(description).to_be_hidden()
    visit.page.select_option("#model", "z-image")
    expect(description).to_have_text("It paints noise.")
    expect(description).to_be_visible()
    expect(visit.page.locator("#source-list img")).to_have_count(1)


def test_the_footer_shows_the_servers_version(visit: Visit) -> None:
    expect(visit.page.locator("footer")).to_have_text(f"Server version {__version__}")


def test_a_rejected_request_marks_its_field(visit: Visit) -> None:
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
    page.keyboard.type("520")  # not a multiple of 32, so the browser does not submit the form
    expect(page.locator("#width")).to_have_value("520")
    page.click("#generate")
    assert not page.locator("#width").evaluate("input => input.validity.valid")
    expect(page.locator("article")).to_have_count(1)


def test_an_image_is_reused_downloaded_and_deleted(visit: Visit) -> None:
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


def test_a_deleted_image_shows_a_message(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 404"]
    card = visit.generate("a boat that is gone", num_inference_steps=4)
    visit.file(card)
    (job, *_) = httpx.get(f"{visit.url}/v1/images/jobs").json()["data"]
    httpx.post(f"{visit.url}/v1/images/jobs/{job['id']}/purge").raise_for_status()
    visit.open()
    expect(card).to_contain_text("The server has deleted this image.")


RUN = {
    "curl": ["bash", "-c"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}


@needs_node
def test_code_snippets_generate_the_same_image(visit: Visit, tmp_path: Path) -> None:
    prompt = "it's a \"boat\" & $HOME,\n'ünïcode'"
    card = visit.generate(prompt, num_inference_steps=4, seed=6, quality="low")
    programs(visit, tmp_path, visit.file(card))
    visit.page.keyboard.press("Escape")
    (tmp_path / "source-1.png").write_bytes(picture(10))
    visit.page.click("#key-button")
    visit.page.fill("#key", "of-no-use-on-an-open-server")
    with visit.page.expect_event("load"):  # the page reloads with the key
        visit.page.keyboard.press("Enter")
    visit.page.locator("#generate:enabled").wait_for()
    bring(visit, "drop", picture(10))
    card = visit.generate(f"@edit {prompt}", num_inference_steps=4, seed=6, n=2, size="")
    programs(visit, tmp_path, visit.file(card))


def programs(visit: Visit, folder: Path, file: bytes) -> None:
    """Runs the code snippets that the viewer of the newest image shows."""
    visit.page.locator(".open").first.click()
    modules = Path(__file__).parents[1] / "http/js/node_modules"
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


def test_the_page_works_by_keyboard(visit: Visit) -> None:
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


def test_a_key_that_is_entered_later_enables_the_form(browser: Browser, keyed: str) -> None:
    with visiting(browser, keyed) as visit:
        visit.expected += ["the server responded with a status of 401"]
        page = visit.page
        page.goto(keyed)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#key-dialog")).to_be_hidden()
        page.evaluate(
            "key => sessionStorage.setItem('api-key', key)", KEY
        )  # as another request's dialog does
        page.locator("#generate:enabled").wait_for()


def test_a_key_is_requested_and_stored_in_the_tab(browser: Browser, keyed: str) -> None:
    with visiting(browser, keyed) as visit:
        visit.expected += ["the server responded with a status of 401"]
        page = visit.page
        page.goto(keyed)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "another-one")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_have_text("The API key is not known here.")
        page.fill("#key", KEY)
        page.get_by_role("button", name="Use key").click()
        page.locator("#generate:enabled").wait_for()
        expect(page.locator("#state-words")).to_have_text("Asleep")
        card = visit.generate("a boat that cannot be made")
        visit.until(card, lambda words: words.startswith("Model loading failed"))
        card.get_by_role("button", name="Again").click()
        visit.open()  # a reload, which must not ask for the key again
        expect(page.locator("#key-dialog")).to_be_hidden()
        assert KEY not in str(page.context.storage_state(indexed_db=True))
        page.click("#key-button")
        page.get_by_role("button", name="Forget key").click()
        # Browsers report that a dialog is closed with a delay.
        until(lambda: page.evaluate("sessionStorage.getItem('api-key')") is None)
