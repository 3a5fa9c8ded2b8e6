"""The safety checker and the prompt expander of `configs/tiny-helpers.yaml`, in each API.

The classifier has the real class. Its weights flag one known image and one known source image.
"""

import base64
import io
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from zai import ZaiClient, core

from deployments.families.glm_image import tiny
from deployments.helpers.chat_model import tiny as chat_model
from deployments.types import Pixels
from serve_app.generation.prompt_expansion import INSTRUCTION
from tests.classifiers import flagging
from tests.polling import until
from tests.serve.conftest import ROOT, Running, Upstream, config_file, served

pytestmark = pytest.mark.slow
PROMPT = "a boat"
SAFE, UNSAFE = 31, 32
"""Seeds of two images. The safety checker flags the second one."""
STEPS = 10
EXTRA: dict[str, Any] = {"num_inference_steps": STEPS}
FAL: dict[str, Any] = {
    "prompt": PROMPT,
    "image_size": "square",
    "num_inference_steps": STEPS,
    "output_format": "png",
    "num_images": 2,
    "seed": SAFE,
}


def noise(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (512, 512, 3), dtype=np.uint8)


SAFE_SOURCE, UNSAFE_SOURCE = noise(1), noise(2)


@dataclass(frozen=True)
class Helped:
    """A server with both helpers, and its expected images.

    Attributes:
        running: the server.
        images: expected image of each seed.
        edited: expected edit of the safe source image.
    """

    running: Running
    images: dict[int, Pixels]
    edited: Pixels

    @property
    def url(self) -> str:
        return self.running.url


@pytest.fixture(scope="module")
def helped(
    tmp_path_factory: pytest.TempPathFactory, upstream: Callable[[Path], Upstream]
) -> Iterator[Helped]:
    reference = upstream(tiny.cached())
    images = {seed: reference(PROMPT, 512, 512, seed=seed, steps=STEPS) for seed in (SAFE, UNSAFE)}
    edited = reference(PROMPT, 512, 512, seed=SAFE, steps=1, sources=(SAFE_SOURCE,))
    folder = tmp_path_factory.mktemp("helped")
    safe = [images[SAFE], edited, SAFE_SOURCE, *map(noise, range(3, 8))]
    classifier = flagging(folder / "classifier", [images[UNSAFE], UNSAFE_SOURCE], safe)
    args = yaml.safe_load((ROOT / "configs/tiny-helpers.yaml").read_text())["applications"][0]["args"]
    args["safety_checker"]["classifier"]["checkpoint"] = str(classifier)
    with served(config_file(folder, args.pop("models"), **args)) as running:
        yield Helped(running, images, edited)


@pytest.fixture
def http(helped: Helped) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=helped.url, timeout=120) as client:
        yield client


@pytest.fixture
def sdk(helped: Helped) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{helped.url}/v1", api_key="none") as client:
        yield client


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)))


def generate(sdk: openai.OpenAI, seed: int, prompt: str = PROMPT, **fields: Any) -> Pixels:
    extra = fields.pop("extra", {})
    answer = sdk.images.generate(
        prompt=prompt,
        size="512x512",
        response_format="b64_json",
        extra_body=EXTRA | {"seed": seed} | extra,
        **fields,
    )
    assert answer.data
    return pixels(base64.b64decode(answer.data[0].b64_json or ""))


class TestOpenAI:
    def test_an_image_that_is_not_flagged_is_unchanged(self, sdk: openai.OpenAI, helped: Helped) -> None:
        assert np.array_equal(generate(sdk, SAFE), helped.images[SAFE])

    def test_a_flagged_image_is_an_error(self, sdk: openai.OpenAI) -> None:
        for n in (1, 2):
            with pytest.raises(openai.BadRequestError) as refused:
                generate(sdk, UNSAFE + 1 - n, n=n)
            assert refused.value.code == "content_policy_violation"
            assert "flagged" in refused.value.message

    def test_moderation_low_disables_the_check(self, sdk: openai.OpenAI, helped: Helped) -> None:
        assert np.array_equal(generate(sdk, UNSAFE, moderation="low"), helped.images[UNSAFE])

    def test_a_stream_of_a_flagged_image_ends_with_an_error(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.APIError, match="flagged"):
            list(
                sdk.images.generate(
                    prompt=PROMPT, size="512x512", stream=True, extra_body=EXTRA | {"seed": UNSAFE}
                )
            )

    def test_a_flagged_source_image_is_rejected(self, sdk: openai.OpenAI, helped: Helped) -> None:
        extra = {"num_inference_steps": 1, "seed": SAFE}
        answer = sdk.images.edit(
            image=png(SAFE_SOURCE), prompt=PROMPT, response_format="b64_json", extra_body=extra
        )
        assert answer.data
        made = pixels(base64.b64decode(answer.data[0].b64_json or ""))
        assert np.array_equal(made, helped.edited)
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.images.edit(image=png(UNSAFE_SOURCE), prompt=PROMPT, extra_body=extra)
        assert (refused.value.code, refused.value.param) == ("content_policy_violation", "image")

    def test_a_job_with_a_flagged_image_fails(self, http: httpx.Client) -> None:
        job = job_of(http, seed=UNSAFE)
        assert (job["status"], job["error"]["code"]) == ("failed", "content_policy_violation")

    def test_models_list_the_helpers(self, sdk: openai.OpenAI) -> None:
        (model,) = sdk.models.list().data
        facts = model.model_extra or {}
        assert (facts["safety_checker"], facts["prompt_expansion"]) == (True, True)
        assert {"moderation", "enable_prompt_expansion"} <= set(facts["parameters"])


def job_of(http: httpx.Client, **fields: Any) -> Any:
    """Submits a job, and returns it when it has ended."""
    body = {"prompt": PROMPT, "size": "512x512"} | EXTRA | fields
    path = http.post("/v1/images/jobs", json=body).raise_for_status().headers["location"]
    until(lambda: http.get(path).json()["status"] not in ("queued", "running"))
    return http.get(path).json()


class TestFal:
    def test_a_flagged_image_is_black_and_reported(self, http: httpx.Client, helped: Helped) -> None:
        answer = http.post("/fal-ai/glm-image", json=FAL).raise_for_status().json()
        self.check_flagged(answer, http, helped)

    def test_a_flagged_image_in_the_queue_is_black_too(self, http: httpx.Client, helped: Helped) -> None:
        queued = http.post("/queue/fal-ai/glm-image", json=FAL).raise_for_status().json()
        until(lambda: http.get(queued["status_url"]).json()["status"] == "COMPLETED")
        self.check_flagged(http.get(queued["response_url"]).raise_for_status().json(), http, helped)

    def check_flagged(self, answer: Any, http: httpx.Client, helped: Helped) -> None:
        assert answer["has_nsfw_concepts"] == [False, True]
        safe, black = (pixels(http.get(image["url"]).content) for image in answer["images"])
        assert np.array_equal(safe, helped.images[SAFE])
        assert black.shape == (512, 512, 3)
        assert not black.any()

    def test_a_request_can_disable_the_safety_checker(self, http: httpx.Client, helped: Helped) -> None:
        answer = http.post("/fal-ai/glm-image", json=FAL | {"enable_safety_checker": False}).json()
        assert answer["has_nsfw_concepts"] == [False, False]
        made = pixels(http.get(answer["images"][1]["url"]).content)
        assert np.array_equal(made, helped.images[UNSAFE])

    def test_a_flagged_source_image_is_a_422(self, http: httpx.Client) -> None:
        url = f"data:image/png;base64,{base64.b64encode(png(UNSAFE_SOURCE)).decode()}"
        answer = http.post("/fal-ai/glm-image/image-to-image", json=FAL | {"image_urls": url})
        assert answer.status_code == 422
        (problem,) = answer.json()["detail"]
        assert (problem["type"], problem["loc"]) == ("content_policy_violation", ["body", "image_urls"])


class TestZai:
    @pytest.fixture
    def client(self, helped: Helped) -> Iterator[ZaiClient]:
        client = ZaiClient(api_key="none", base_url=f"{helped.url}/api/paas/v4")
        yield client
        client.close()  # type: ignore[no-untyped-call]

    def arguments(self, seed: int) -> dict[str, Any]:
        extra = EXTRA | {"seed": seed}
        return {"model": "glm-image", "prompt": PROMPT, "size": "512x512", "extra_body": extra}

    def test_a_safe_image_has_the_lowest_severity(self, client: ZaiClient) -> None:
        made = client.images.generations(**self.arguments(SAFE))
        assert (made.model_extra or {})["content_filter"] == [{"role": "assistant", "level": 3}]

    def test_a_flagged_image_has_the_highest_severity(self, client: ZaiClient, sent: list[str]) -> None:
        with pytest.raises(core.APIRequestFailedError) as refused:
            client.images.generations(**self.arguments(UNSAFE))
        answer = refused.value.response.json()
        assert answer["error"]["code"] == "1301"
        assert answer["content_filter"] == [{"role": "assistant", "level": 0}]
        assert len(sent) == 1

    def test_a_task_with_a_flagged_image_fails(self, client: ZaiClient) -> None:
        task = client.images.async_generations(**self.arguments(UNSAFE)).id or ""
        until(lambda: client.images.retrieve_images_result(task).task_status != "PROCESSING")
        done = client.images.retrieve_images_result(task)
        facts = done.model_extra or {}
        assert (done.task_status, facts["error"]["code"]) == ("FAIL", "1301")
        assert facts["content_filter"] == [{"role": "assistant", "level": 0}]


def test_a_pixazo_request_with_a_flagged_image_fails(http: httpx.Client) -> None:
    body = {name: FAL[name] for name in ("prompt", "image_size", "num_inference_steps")} | {"seed": UNSAFE}
    path = "/glm-image/v1/glm-image-request"
    answer = http.post(path, json=body, headers={"Prefer": "wait=60"}).json()
    assert (answer["status"], answer["error"]["code"]) == ("FAILED", "CONTENT_POLICY_VIOLATION")
    answer = http.post(path, json=body | {"seed": SAFE}, headers={"Prefer": "wait=60"}).json()
    assert answer["status"] == "COMPLETED"


def expanded(prompt: str) -> str:
    """Returns the prompt that transformers generates with the tiny chat model and the same settings."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model.cached())
    model = AutoModelForCausalLM.from_pretrained(chat_model.cached())
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, do_sample=False, temperature=None, max_new_tokens=24)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])).strip()


class TestExpansion:
    def test_the_expanded_prompt_is_used_and_returned(
        self, sdk: openai.OpenAI, upstream: Callable[[Path], Upstream]
    ) -> None:
        expansion = expanded(PROMPT)
        answer = sdk.images.generate(
            prompt=PROMPT,
            size="512x512",
            response_format="b64_json",
            moderation="low",
            n=2,
            extra_body={"num_inference_steps": 2, "seed": 5, "enable_prompt_expansion": True},
        )
        assert answer.data
        assert [image.revised_prompt for image in answer.data] == [expansion, expansion]
        for seed, image in enumerate(answer.data, 5):
            made = pixels(base64.b64decode(image.b64_json or ""))
            assert np.array_equal(made, upstream(tiny.cached())(expansion, 512, 512, seed=seed))

    def test_fal_returns_the_expanded_prompt(self, http: httpx.Client) -> None:
        body = FAL | {"enable_prompt_expansion": True, "enable_safety_checker": False, "num_images": 1}
        assert http.post("/fal-ai/glm-image", json=body).json()["prompt"] == expanded(PROMPT)

    def test_an_expansion_that_changes_quoted_text_is_discarded(self, http: httpx.Client) -> None:
        prompt = f'{PROMPT} called "Aurora"'
        fields: dict[str, Any] = {"num_inference_steps": 1, "moderation": "low"}
        job = job_of(http, prompt=prompt, enable_prompt_expansion=True, **fields)
        assert [image["revised_prompt"] for image in job["result"]["data"]] == [prompt]
        assert any("not expanded: the language model changed" in line["message"] for line in job["log"])
        job = job_of(http, prompt=PROMPT, enable_prompt_expansion=True, **fields)
        assert [image["revised_prompt"] for image in job["result"]["data"]] == [expanded(PROMPT)]
        assert not any("not expanded" in line["message"] for line in job["log"])


def test_the_log_contains_the_reason_for_no_expansion_but_no_prompt(
    sdk: openai.OpenAI, helped: Helped
) -> None:
    canary = "canary-71d0c3"
    extra = {"enable_prompt_expansion": True, "num_inference_steps": 1}
    for prompt in (canary, f'{canary} called "Aurora"'):
        generate(sdk, SAFE, prompt, moderation="low", extra=extra)

    def lines() -> list[dict[str, object]]:
        return [line for line in helped.running.log_lines() if "expansion_s" in line]

    until(lambda: any("not_expanded" in line for line in lines()), 10)
    (reason,) = {line["not_expanded"] for line in lines() if "not_expanded" in line}
    assert reason == "the language model changed what stands in quotation marks"
    files = [file for file in helped.running.logs().rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if canary.encode() in file.read_bytes()]


def test_a_killed_safety_checker_is_replaced_and_called_again(sdk: openai.OpenAI, helped: Helped) -> None:
    assert generate(sdk, SAFE).any()
    (checker,) = helped.running.replicas("safety-checker")
    checker.send_signal(signal.SIGKILL)
    assert np.array_equal(generate(sdk, SAFE), helped.images[SAFE])


def test_health_reports_both_helpers_and_unload_unloads_them(http: httpx.Client, sdk: openai.OpenAI) -> None:
    generate(sdk, SAFE, extra={"enable_prompt_expansion": True, "num_inference_steps": 1})
    helpers = ("safety_checker", "prompt_expander")

    def states() -> set[str]:
        health = http.get("/health").json()
        return {health[helper]["state"] for helper in helpers}

    until(lambda: states() == {"ready"})
    answer = http.post("/v1/internal/unload?model=glm-image").json()
    assert answer["models"].keys() == {"glm-image"}
    assert not answer.keys() & set(helpers)
    until(lambda: states() == {"ready"})
    answer = http.post("/v1/internal/unload").json()
    assert {answer[helper]["state"] for helper in helpers} == {"unloaded"}
