"""Tests of the page in a browser: source images, form, viewer, keyboard and API key."""

import base64
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from deployments.families import FAMILIES
from serve_app import __version__
from tests.conftest import needs_node
from tests.http.conftest import KEY, keys
from tests.http.stages import BROKEN
from tests.playground.conftest import Visit, answered, bring, picture, stand_ins, visiting
from tests.polling import until
from tests.serve.conftest import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[str]:
    """URL of a server that requires a key, with a model that cannot be loaded."""
    with stand_ins(tmp_path, tiny_model(BROKEN), auth=keys()) as server:
        yield server.url


def test_examples_fill_the_prompt(visit: Visit) -> None:
    page = visit.page
    page.locator("#empty button").nth(1).click()
    expect(page.locator("#prompt")).to_have_value(FAMILIES["glm_image"].examples[1])
    for _ in range(5):
        before = page.locator("#prompt").input_value()
        page.click("#surprise")
        expect(page.locator("#prompt")).not_to_have_value(before)
    expect(page.locator("article")).to_have_count(0)


def with_models(visit: Visit, **fields: Any) -> None:
    """Opens the page with other fields of each model."""
    answer = httpx.get(f"{visit.url}/v1/models").json()
    models = [model | fields for model in answer["data"]]
    visit.page.route("**/v1/models", lambda route: route.fulfill(json=answer | {"data": models}))
    visit.open()


def test_a_model_has_its_own_examples(visit: Visit) -> None:
    examples = ["one boat", "two boats", "three boats", "four boats"]
    with_models(visit, examples=examples)
    assert visit.page.locator("#empty button").all_inner_texts() == examples[:3]
    expect(visit.page.locator("#prompt")).to_have_attribute("placeholder", "four boats")
    seen: set[str] = set()
    while seen != set(examples):
        visit.page.click("#surprise")
        seen.add(visit.page.locator("#prompt").input_value())


@pytest.mark.parametrize("vocabulary", [None, ["circle", "star"]])
def test_a_prompt_without_any_known_word_gets_a_hint(visit: Visit, vocabulary: list[str] | None) -> None:
    with_models(visit, vocabulary=vocabulary)
    hint = "The model knows none of these words."
    for prompt, is_known in (("A red Circle, please", True), ("A castle in the fog", vocabulary is None)):
        card = visit.generate(prompt, num_inference_steps=2)
        visit.file(card)
        assert (hint in card.locator(".words").inner_text()) != is_known


@pytest.mark.parametrize(
    ("default", "most", "step"),
    [
        ("1024x1024", 2048**2, 32),
        ("512x512", 2048**2, 32),
        ("1280x768", 2**20, 16),
        ("1024x1024", 2**20, 256),
    ],
)
def test_shapes_have_true_names_and_legal_sizes(visit: Visit, default: str, most: int, step: int) -> None:
    (model, *_) = httpx.get(f"{visit.url}/v1/models").json()["data"]
    with_models(
        visit,
        sizes=model["sizes"] | {"multiple_of": step},
        limits=model["limits"] | {"pixels": most},
        defaults=model["defaults"] | {"size": default},
    )
    radios = visit.page.locator("#shape-list label")
    shapes = {
        name.strip(): radios.nth(index).locator("input").get_attribute("value") or ""
        for index, name in enumerate(radios.all_text_contents())
    }
    assert (shapes.pop("Auto"), shapes.pop("Custom")) == ("", "custom")
    assert len(shapes) == (7 if step < 256 else 5)
    for name, size in shapes.items():
        width, height = map(int, size.split("x"))
        across, down = map(int, name.split(":"))
        assert width / height == pytest.approx(across / down, rel=0.03)
        assert width % step == height % step == 0
        assert width * height <= most
        assert 512 <= min(width, height) <= max(width, height) <= 2048
    expect(visit.page.locator("#pixels")).to_have_text(default.replace("x", " × "))


def test_a_custom_size_is_rounded_to_a_legal_one(visit: Visit) -> None:
    page = visit.page
    (model, *_) = httpx.get(f"{visit.url}/v1/models").json()["data"]
    with_models(visit, limits=model["limits"] | {"pixels": 1024 * 768})
    page.locator("[value=custom]").check()
    expect(page.locator("#width")).to_have_value("1024")
    page.fill("#width", "520")
    page.fill("#height", "99999")
    page.locator("#height").blur()
    expect(page.locator("#width")).to_have_value("512")
    expect(page.locator("#height")).to_have_value("1536")
    page.fill("#width", "1000")
    page.keyboard.press("Tab")
    expect(page.locator("#width")).to_have_value("992")
    expect(page.locator("#height")).to_have_value("768")
    expect(page.locator("#pixels")).to_have_text("992 × 768")
    card = visit.generate("a boat of an odd size", size="700x700")
    visit.file(card)
    expect(card.locator(".words")).to_contain_text("704×704")


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
    card.get_by_role("button", name="Reuse settings").click()
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
    visit.open_options()
    visit.page.select_option("[name=model]", "z-image")
    expect(description).to_have_text("It paints noise.")
    expect(description).to_be_visible()
    expect(visit.page.locator("#source-list img")).to_have_count(1)


def test_the_servers_version_is_shown(visit: Visit) -> None:
    visit.page.click("#state")
    expect(visit.page.locator("#version")).to_have_text(f"version {__version__}")


def test_a_rejected_request_marks_its_field(visit: Visit) -> None:
    page = visit.page
    visit.expected += ["the server responded with a status of 400"]
    visit.file(visit.generate("a boat that is there already", num_inference_steps=2))
    visit.fill("a boat", size="2048x2048", num_inference_steps=100, n=10)
    page.click("#generate")
    problem = page.locator("#problem")
    expect(problem).to_contain_text("megapixel")
    expect(page.locator("article")).to_have_count(1)
    at_fault = page.locator("[aria-invalid=true]")
    expect(at_fault).to_be_focused()
    page.fill("[name=n]", "1")
    expect(problem).to_be_empty()
    expect(at_fault).to_have_count(0)


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
    page.click("#viewer .reuse")
    for name, value in {"prompt": "a boat for later", "num_inference_steps": "4", "seed": "8"}.items():
        expect(page.locator(f"[name={name}]")).to_have_value(value)
    expect(page.locator("[name=output_format]")).to_have_value("webp")
    card.locator(".open").click()
    page.click("#viewer .edit")
    expect(page.get_by_alt_text("image-8.webp")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_role("button", name="Remove image-8.webp").click()
    card.get_by_role("button", name="Edit").click()
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


def seeds(visit: Visit) -> list[str]:
    """Returns the seed of each finished card, the newest first."""
    words = visit.page.locator("article[data-state=made] .words").all_inner_texts()
    return [match[1] for one in words if (match := re.search(r"seed\s([0-9]+)", one))]


def test_a_variation_runs_at_once_with_another_seed(visit: Visit) -> None:
    page = visit.page
    visit.file(visit.generate("a boat that varies", num_inference_steps=4, seed=8, n=2))
    visit.fill("something else", seed=1)
    page.locator("article").first.get_by_role("button", name="Variation").click()
    expect(page.locator("article[data-state=made]")).to_have_count(2)
    newest, first = page.locator("article .prompt").all_inner_texts()
    assert newest == first == "a boat that varies"
    expect(page.locator("article").first.locator(".tile")).to_have_count(2)
    expect(page.locator("#prompt")).to_have_value("something else")
    page.locator(".open").first.click()
    page.click("#viewer .vary")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("article[data-state=made]")).to_have_count(3)
    expect(page.locator("article").first.locator(".tile")).to_have_count(1)
    assert len(set(seeds(visit))) == 3


def test_a_failed_request_is_retried_with_its_seed(browser: Browser, keyed: str) -> None:
    with visiting(browser, keyed) as visit:
        visit.page.add_init_script(f"sessionStorage.setItem('api-key', '{KEY}')")
        visit.open()
        card = visit.generate("a boat that cannot be made", seed=5)
        visit.until(card, lambda words: words.startswith("Model loading failed"))
        card.get_by_role("button", name="Retry").click()
        expect(visit.page.locator("article[data-state=failed]")).to_have_count(2)
    with httpx.Client(base_url=keyed, headers={"authorization": f"Bearer {KEY}"}) as client:
        assert [job["seed"] for job in client.get("/v1/images/jobs").json()["data"]] == [5, 5]


def test_the_viewer_steps_zooms_copies_and_deletes(visit: Visit) -> None:
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name in ("one", "two"):
        visit.file(visit.generate(f"boat {name}", num_inference_steps=2, size="1024x1024"))
    page.locator(".open").first.click()
    heading, image = page.locator("#viewer-prompt"), page.locator("#viewer-image")
    expect(heading).to_have_text("boat two")
    page.keyboard.press("ArrowLeft")
    expect(heading).to_have_text("boat two")
    page.keyboard.press("ArrowRight")
    expect(heading).to_have_text("boat one")
    expect(page.locator("#next")).to_be_disabled()
    page.click("#previous")
    expect(heading).to_have_text("boat two")
    width = "image => image.decode().then(() => image.width)"
    assert image.evaluate(width) < 1024
    page.click("#zoom")
    assert image.evaluate(width) == 1024
    assert page.locator("#stage").evaluate("stage => stage.scrollTop > 0")
    image.click()
    assert image.evaluate(width) < 1024
    page.click("#copy-image")
    expect(page.locator("#copy-image")).to_have_text("Copied")
    copied = page.evaluate(COPIED)
    made = httpx.get(f"{visit.url}/{image.get_attribute('src')}").content
    assert pixels(base64.b64decode(copied)) == pixels(made)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#viewer .remove")
    expect(page.locator("#viewer")).to_be_hidden()
    assert page.locator("article .prompt").all_inner_texts() == ["boat one"]


COPIED = """async () => {
  const [item] = await navigator.clipboard.read();
  const bytes = new Uint8Array(await (await item.getType("image/png")).arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def test_two_images_are_compared(visit: Visit) -> None:
    """An edit is compared with its source. Any two images that are selected are compared, too."""
    page = visit.page
    before, compare, split = page.locator("#before"), page.locator("#compare"), page.locator("#split")
    first = visit.generate("a boat to be changed", num_inference_steps=2)
    visit.file(first)
    first.locator(".open").click()
    for one in (before, compare, split):
        expect(one).to_be_hidden()
    page.click("#viewer .edit")
    second = visit.generate("a changed boat", num_inference_steps=2, size="")
    visit.file(second)
    second.locator(".open").click()
    expect(before).to_have_attribute("src", re.compile("^blob:"))
    assert before.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 50% 0px 0px)"
    split.focus()
    page.keyboard.press("Home")
    expect(page.locator("#viewer-prompt")).to_have_text("a changed boat")
    assert before.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 100% 0px 0px)"
    compare.click()
    expect(before).to_be_hidden()
    page.keyboard.press("Escape")
    for card in (first, second):
        card.locator("input").check()
    page.click("#compare-picked")
    path = first.locator("img").get_attribute("src") or ""
    expect(before).to_have_attribute("src", path)
    expect(page.locator("#viewer-prompt")).to_have_text("a changed boat")


def test_selected_images_are_downloaded_and_edited(visit: Visit) -> None:
    page = visit.page
    files = [visit.file(visit.generate(f"boat {seed}", num_inference_steps=2, seed=seed)) for seed in (1, 2)]
    expect(page.locator("#picked")).to_be_hidden()
    for card in page.locator("article").all():
        card.locator("input").check()
    expect(page.locator("#picked-count")).to_have_text("2 selected")
    with page.expect_download() as downloading:
        page.click("#save-picked")
    assert downloading.value.suggested_filename == "images.zip"
    with zipfile.ZipFile(downloading.value.path()) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "1-image-2.png": files[1],
            "2-image-1.png": files[0],
        }
    expect(page.locator("#picked")).to_be_hidden()
    for card in page.locator("article").all():
        card.locator("input").check()
    page.click("#edit-picked")
    expect(page.locator("#source-list img")).to_have_count(2)
    expect(page.locator("#generate")).to_have_text("Edit")


def test_prompts_are_searched(visit: Visit) -> None:
    page = visit.page
    for name in ("Red", "blue"):
        visit.file(visit.generate(f"a {name} boat", num_inference_steps=2))
    page.fill("#search", "red")
    expect(visit.card("a Red boat")).to_be_visible()
    expect(visit.card("a blue boat")).to_be_hidden()
    page.locator(".open:visible").click()
    expect(page.locator("#next")).to_be_disabled()
    page.keyboard.press("Escape")
    visit.generate("a green boat", num_inference_steps=2)
    for name in ("Red", "blue", "green"):
        expect(visit.card(f"a {name} boat")).to_be_visible()


def test_jobs_of_other_browsers_are_shown(browser: Browser, url: str) -> None:
    """The list of the server has pages. Failed jobs have nothing to show. Another key has other jobs."""
    prompts = [f"boat {number:02}" for number in range(23)]
    ids = [submitted(url, prompt) for prompt in prompts]
    gone = submitted(url, "a boat that is cancelled", num_inference_steps=100, n=10)
    httpx.delete(f"{url}/v1/images/jobs/{gone}").raise_for_status()
    until(lambda: httpx.get(f"{url}/v1/images/jobs/{ids[-1]}").json()["status"] == "succeeded")
    with visiting(browser, url) as visit:
        visit.open()
        page = visit.page
        expect(page.locator("article")).to_have_count(19)
        assert page.locator("article .prompt").all_inner_texts() == prompts[:3:-1]
        assert visit.file(visit.card("boat 22"))
        page.click("#older")
        expect(page.locator("article")).to_have_count(23)
        expect(page.locator("#older")).to_be_hidden()
        assert page.locator("article .prompt").all_inner_texts() == prompts[::-1]
        visit.card("boat 22").get_by_role("button", name="Reuse settings").click()
        expect(page.locator("#prompt")).to_have_value("boat 22")
        expect(page.locator("#pixels")).to_have_text("512 × 512")
        running = submitted(url, "a boat in the making", num_inference_steps=100, size="1024x1024")
        visit.open()
        expect(page.locator("article").first).to_contain_text("A request of another browser")
        expect(page.locator("article").first).to_have_attribute("data-state", "made")
        expect(page.locator("article").first).to_contain_text("a boat in the making")
        page.on("dialog", lambda dialog: dialog.accept())
        page.locator("article").first.get_by_role("button", name="Delete").click()
        until(lambda: httpx.get(f"{url}/v1/images/jobs/{running}").status_code == 404)


def submitted(url: str, prompt: str, **fields: Any) -> str:
    """Submits a job, and returns its id."""
    body = {"prompt": prompt, "size": "512x512", "num_inference_steps": 1, **fields}
    answer = httpx.post(f"{url}/v1/images/jobs", json=body).raise_for_status()
    return str(answer.json()["id"])


def test_a_deleted_image_shows_a_message(visit: Visit) -> None:
    visit.expected += ["the server responded with a status of 404"]
    card = visit.generate("a boat that is gone", num_inference_steps=4)
    visit.file(card)
    (job, *_) = httpx.get(f"{visit.url}/v1/images/jobs").json()["data"]
    httpx.post(f"{visit.url}/v1/images/jobs/{job['id']}/purge").raise_for_status()
    visit.open()
    expect(card).to_contain_text("The server has deleted this image.")
    expect(card.locator("input")).to_be_hidden()


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
    tab_to("#shape-list input:checked")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pixels")).to_have_text("1024 × 1024")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pixels")).not_to_have_text("1024 × 1024")
    tab_to("#more > summary")
    page.keyboard.press("Enter")
    tab_to("[name=num_inference_steps]")
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
    tab_to("#viewer .reuse")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(page.locator("article")).to_have_count(2)
    tab_to("article:first-child .reuse")


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
        expect(page.locator("#state")).to_have_text("Asleep")
        card = visit.generate("a boat that cannot be made")
        visit.until(card, lambda words: words.startswith("Model loading failed"))
        card.get_by_role("button", name="Reuse settings").click()
        visit.open()  # a reload, which must not ask for the key again
        expect(page.locator("#key-dialog")).to_be_hidden()
        assert KEY not in str(page.context.storage_state(indexed_db=True))
        page.click("#key-button")
        page.get_by_role("button", name="Forget key").click()
        # Browsers report that a dialog is closed with a delay.
        until(lambda: page.evaluate("sessionStorage.getItem('api-key')") is None)
