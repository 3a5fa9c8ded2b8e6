"""The requests and answers in the vendors' documents, with this server's address and keys.

fal: https://fal.ai/models/fal-ai/glm-image/image-to-image/llms.txt, Z.ai: https://docs.z.ai/guides/image/glm-image,
Pixazo: https://www.pixazo.ai/models/text-to-image/glm-image-api.
The module is long because it has one test for each printed example.
"""

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.dialects import pixazo
from serve_app.errors import Busy, RequestError, server_error
from tests.conftest import needs_node
from tests.http.conftest import ROOT, Endpoint
from tests.polling import until

KITTEN = (
    "A cute little kitten sitting on a sunny windowsill, with the background of blue sky and white clouds."
)
MENU = (
    "An elegant watercolor menu card painted on textured cream paper, soft turquoise washes, golden accents, "
    "dreamy bokeh background, editorial photography style"
)
EDIT = "glm-image-image-to-image"
SUBMIT = "/glm-image/v1/glm-image-request"
SUBMIT_EDIT = f"/{EDIT}/v1/{EDIT}-request"
RESULT_OF_EDIT = f"{SUBMIT_EDIT}-result"
OPTIONS = {
    "image_size": "square_hd",
    "num_inference_steps": 30,
    "guidance_scale": 1.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
}
ALL_OPTIONS = OPTIONS | {"seed": 42, "sync_mode": False}
PIXAZOS_IMAGES = {
    "images": [
        {"file_name": "nano-banana-pro-edit-output.png", "content_type": "image/png", "url": "[RESPONSE_URL]"}
    ],
    "description": "",
}
FALS_IMAGES = {
    "images": [{"height": 1536, "content_type": "image/png", "url": "https://…", "width": 1024}],
    "prompt": "",
}


Run = Callable[..., str]
Sized = Callable[[str], tuple[int, int]]


def covers(answer: Any, example: Any) -> bool:
    """Returns whether an answer has every field of an example, with values of the same types."""
    if type(answer) is not type(example):
        return False
    if isinstance(example, dict):
        return all(name in answer and covers(answer[name], value) for name, value in example.items())
    if isinstance(example, list):
        return len(answer) >= len(example) and all(covers(one, example[0]) for one in answer)
    return True


def assert_is_pixazos(answer: Any) -> None:
    assert covers(answer, PIXAZOS_IMAGES), answer
    assert answer["description"] == ""
    assert answer["status"] == "COMPLETED"
    assert answer["output"]["media_url"] == [image["url"] for image in answer["images"]]


def completed(ask: Callable[[], httpx.Response]) -> Any:
    """Polls as Pixazo's clients do; returns the last answer."""
    until(lambda: ask().json()["status"] not in ("QUEUED", "PROCESSING"), 120)
    answer = ask().json()
    assert_is_pixazos(answer)
    return answer


@pytest.fixture
def http(vendors: Endpoint) -> Iterator[httpx.Client]:
    """A client that sends its key as Pixazo's clients do."""
    with vendors.client(ocp_apim_subscription_key=vendors.key) as client:
        yield client


@pytest.fixture
def size(vendors: Endpoint) -> Iterator[Sized]:
    """Returns the size of an image at a URL. Images need no key."""
    with vendors.client() as stranger:
        yield lambda url: Image.open(io.BytesIO(stranger.get(url).raise_for_status().content)).size


@pytest.fixture(scope="module")
def catwalk(vendors: Endpoint) -> str:
    """URL of the image that the documents edit."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((1024, 1536)).save(file, "PNG")
    with vendors.client(authorization=f"Key {vendors.key}") as client:
        place = client.post("/storage/upload/initiate", json={"file_name": "catwalk.png"}).json()
        client.put(place["upload_url"], content=file.getvalue()).raise_for_status()
    return str(place["file_url"])


@pytest.fixture
def run(vendors: Endpoint) -> Run:
    """Runs a program in the environment of the vendors' clients; returns its output."""
    places = {"ZAI_BASE_URL": f"{vendors.url}/api/paas/v4", "CURL_CA_BUNDLE": str(vendors.certificate)}

    def run(*command: str, cwd: Path = ROOT) -> str:
        ran = subprocess.run(
            command,
            env=os.environ | vendors.environment | {"FAL_KEY": vendors.key} | places,
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


def test_fals_full_example(vendors: Endpoint, size: Sized, catwalk: str) -> None:
    body = {"prompt": "Make the dress red."} | OPTIONS | {"image_urls": catwalk}
    with vendors.client(authorization=f"Key {vendors.key}") as fal:
        answer = fal.post("/fal-ai/glm-image/image-to-image", json=body)
    assert answer.status_code == 200, answer.text
    assert_is_fals(answer.json(), size)


def assert_is_fals(answer: Any, size: Sized) -> None:
    assert covers(answer, FALS_IMAGES), answer
    assert answer.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert size(answer["images"][0]["url"]) == (1024, 1024)


def test_fals_example_with_curl(run: Run, vendors: Endpoint, size: Sized, catwalk: str) -> None:
    """The body is the document's example of the required fields."""
    printed = run(
        "bash",
        "-c",
        f"""curl --request POST \\
  --url {vendors.url}/fal-ai/glm-image/image-to-image \\
  --header "Authorization: Key $FAL_KEY" \\
  --header "Content-Type: application/json" \\
  --data '{{
     "prompt": "Make the dress red.",
     "image_urls": "{catwalk}"
   }}'
""",
    )
    assert_is_fals(json.loads(printed), size)


def test_fals_example_in_python(run: Run, size: Sized, catwalk: str) -> None:
    *log, result = run(
        sys.executable,
        "-c",
        f"""
import fal_client

def on_queue_update(update):
    if isinstance(update, fal_client.InProgress):
        for log in update.logs:
           print(log["message"])

result = fal_client.subscribe(
    "fal-ai/glm-image/image-to-image",
    arguments={{
        "prompt": "Make the dress red.",
        "image_urls": "{catwalk}"
    }},
    with_logs=True,
    on_queue_update=on_queue_update,
)
print(result)
""",
    ).splitlines()
    assert "image 0: prior stage" in log
    assert_is_fals(ast.literal_eval(result), size)


@needs_node
def test_fals_example_in_javascript(run: Run, vendors: Endpoint, catwalk: str) -> None:
    program = f"""
import {{ fal }} from "@fal-ai/client";
fal.config({{ proxyUrl: {{ url: "{vendors.url}/api/fal/proxy", when: "always" }} }});

const result = await fal.subscribe("fal-ai/glm-image/image-to-image", {{
  input: {{
    prompt: "Make the dress red.",
    image_urls: "{catwalk}"
  }},
  logs: true,
  onQueueUpdate: (update) => {{
    if (update.status === "IN_PROGRESS") {{
      update.logs.map((log) => log.message).forEach(console.log);
    }}
  }},
}});
console.log(JSON.stringify(result.data));
console.log(result.requestId);
"""
    printed = run("node", "--input-type=module", "-e", program, cwd=ROOT / "tests/http/js").splitlines()
    assert any(line.startswith("began ") for line in printed)
    assert covers(json.loads(printed[-2]), FALS_IMAGES)
    assert len(printed[-1]) == 36


def test_zais_example_with_curl(run: Run, vendors: Endpoint, size: Sized) -> None:
    printed = run(
        "bash",
        "-c",
        f"""curl --request POST \\
    --url {vendors.url}/api/paas/v4/images/generations \\
    --header 'Authorization: Bearer {vendors.key}' \\
    --header 'Content-Type: application/json' \\
    --data '{{
        "model": "glm-image",
        "prompt": "{KITTEN}",
        "size": "1280x1280"
    }}'
""",
    )
    assert size(json.loads(printed)["data"][0]["url"]) == (1280, 1280)


def test_zais_example_in_python(run: Run, vendors: Endpoint, size: Sized) -> None:
    printed = run(
        sys.executable,
        "-c",
        f"""
from zai import ZaiClient
client = ZaiClient(api_key="{vendors.key}")
response = client.images.generations(
    model="glm-image",
    prompt="{KITTEN}",
)
print(response.data[0].url)
""",
    )
    assert size(printed.strip()) == (1280, 1280)


def test_zais_example_in_java(vendors: Endpoint, size: Sized) -> None:
    """The request that the Java client sends. It declares the encoding."""
    body = {"model": "glm-image", "prompt": KITTEN, "size": "1280x1280"}
    kind = "application/json; charset=UTF-8"
    with vendors.client(authorization=f"Bearer {vendors.key}", content_type=kind) as java:
        answer = java.post("/api/paas/v4/images/generations", content=json.dumps(body))
    assert answer.status_code == 200, answer.text
    assert size(answer.json()["data"][0]["url"]) == (1280, 1280)


def test_the_sizes_that_zai_recommends(vendors: Endpoint, size: Sized) -> None:
    recommended = ("1280x1280", "1568x1056", "1056x1568", "1472x1088", "1088x1472", "1728x960", "960x1728")
    with vendors.client(authorization=f"Bearer {vendors.key}") as zai:
        tasks = []
        for one in (*recommended, "512x512", "2048x512"):
            body = {"model": "glm-image", "prompt": "a boat", "size": one, "num_inference_steps": 1}
            answer = zai.post("/api/paas/v4/async/images/generations", json=body)
            assert answer.status_code == 200, answer.text
            tasks.append((one, answer.json()["id"]))

        def task(task_id: str) -> Any:
            return zai.get(f"/api/paas/v4/async-result/{task_id}").json()

        until(lambda: all(task(task_id)["task_status"] != "PROCESSING" for _, task_id in tasks), 300)
        for one, task_id in tasks:
            done = task(task_id)
            assert done["task_status"] == "SUCCESS", done
            width, height = size(done["image_result"][0]["url"])
            assert f"{width}x{height}" == one


def test_pixazos_example_with_curl(run: Run, vendors: Endpoint, http: httpx.Client, size: Sized) -> None:
    """The document's workflow: submit, poll by GET, fetch the URLs of the output."""
    options = json.dumps({"prompt": MENU} | OPTIONS, indent=0)
    submitted = json.loads(
        run(
            "bash",
            "-c",
            f"""curl -X POST "{vendors.url}{SUBMIT}" \\
-H "Content-Type: application/json" \\
-H "Cache-Control: no-cache" \\
-H "Ocp-Apim-Subscription-Key: {vendors.key}" \\
--data-raw '{options}'
""",
        )
    )
    request_id = submitted["request_id"]
    assert submitted["status"] == "QUEUED"
    status = f"/v2/requests/status/{request_id}"
    done = completed(lambda: http.get(status))
    assert size(done["output"]["media_url"][0]) == (1024, 1024)
    printed = run(
        "bash",
        "-c",
        f"""curl -X POST "{vendors.url}{status}" \\
-H "Ocp-Apim-Subscription-Key: {vendors.key}" \\
--data-raw '{{
"request_id": "{request_id}"
}}'
""",
    )
    assert json.loads(printed) == done
    # The content types of the examples in Python and JavaScript, and none.
    for kind in ("application/json", "text/plain;charset=UTF-8", None):
        body = json.dumps({"request_id": request_id})
        answer = http.post(status, content=body, headers={"Content-Type": kind} if kind else None)
        assert answer.json() == done


def test_pixazos_minimum_request_returns_the_images_if_it_waits(http: httpx.Client, size: Sized) -> None:
    headers = {"Cache-Control": "no-cache", "Prefer": "wait=120"}
    done = http.post(SUBMIT, json={"prompt": MENU}, headers=headers).json()
    assert_is_pixazos(done)
    assert size(done["images"][0]["url"]) == (1024, 1024)


def test_pixazos_full_request_is_rejected_for_its_prompt_expansion(http: httpx.Client) -> None:
    body = {"prompt": MENU} | ALL_OPTIONS | {"enable_prompt_expansion": True}
    refused = http.post(SUBMIT, json=body, headers={"Cache-Control": "no-cache"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "INVALID_PARAMETER"
    assert "enable_prompt_expansion" in refused.json()["error"]["message"]


def test_pixazos_full_request_without_prompt_expansion(http: httpx.Client) -> None:
    files = []
    for expansion in ({}, {"enable_prompt_expansion": False}):
        body = {"prompt": MENU} | ALL_OPTIONS | expansion
        done = http.post(
            SUBMIT, json=body, headers={"Cache-Control": "no-cache", "Prefer": "wait=120"}
        ).json()
        assert_is_pixazos(done)
        assert done["seed"] == 42
        files.append(http.get(done["images"][0]["url"]).content)
    assert files[0] == files[1]


def test_pixazos_example_of_an_edit_with_curl(
    run: Run, vendors: Endpoint, http: httpx.Client, size: Sized, catwalk: str
) -> None:
    """The minimum request, and the document's workflow: submit, poll the result, fetch it."""
    submitted = json.loads(
        run(
            "bash",
            "-c",
            f"""curl -X POST "{vendors.url}{SUBMIT_EDIT}" \\
-H "Content-Type: application/json" \\
-H "Cache-Control: no-cache" \\
-H "Ocp-Apim-Subscription-Key: {vendors.key}" \\
--data-raw '{{
"prompt": "Make the dress red.",
"image_urls": [
"{catwalk}"
]
}}'
""",
        )
    )
    request_id = submitted["request_id"]
    assert submitted["status"] == "QUEUED"
    done = completed(lambda: http.post(RESULT_OF_EDIT, json={"request_id": request_id}))
    assert size(done["images"][0]["url"]) == (1024, 1024)
    printed = run(
        "bash",
        "-c",
        f"""curl -X POST "{vendors.url}{RESULT_OF_EDIT}" \\
-H "Content-Type: application/json" \\
-H "Ocp-Apim-Subscription-Key: {vendors.key}" \\
--data-raw '{{
"request_id": "{request_id}"
}}'
""",
    )
    assert json.loads(printed) == done


def test_pixazos_full_request_of_an_edit(http: httpx.Client, size: Sized, catwalk: str) -> None:
    body = {"prompt": "Make the dress red.", "image_urls": [catwalk]} | ALL_OPTIONS
    headers = {"Cache-Control": "no-cache", "Prefer": "wait=120"}
    answer = http.post(SUBMIT_EDIT, json=body | {"enable_prompt_expansion": False}, headers=headers)
    done = answer.json()
    assert_is_pixazos(done)
    assert done["seed"] == 42
    assert size(done["images"][0]["url"]) == (1024, 1024)


def test_pixazos_example_of_a_wrong_size(http: httpx.Client) -> None:
    invalid = http.post(SUBMIT, json={"prompt": MENU, "image_size": "invalid_size"})
    assert (invalid.status_code, invalid.json().keys()) == (400, {"error"})
    error = invalid.json()["error"]
    assert (error.keys(), error["code"]) == ({"code", "message"}, "INVALID_PARAMETER")
    assert error["message"].startswith("Invalid image_size value: invalid_size")


@pytest.mark.parametrize("key", [{}, {"Ocp-Apim-Subscription-Key": "YOUR_SUBSCRIPTION_KEY"}])
def test_pixazos_example_of_a_missing_key(vendors: Endpoint, key: dict[str, str]) -> None:
    message = "Missing or invalid Ocp-Apim-Subscription-Key header"
    with vendors.client() as stranger:
        answer = stranger.post(SUBMIT, json={"prompt": MENU}, headers=key)
    assert (answer.status_code, answer.json()) == (
        401,
        {"error": {"code": "UNAUTHORIZED", "message": message}},
    )


def test_pixazos_example_of_an_edit_without_a_prompt(http: httpx.Client) -> None:
    answer = http.post(SUBMIT_EDIT, json={"image_urls": ["https://example.com/example_inputs/catwalk.png"]})
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "Missing required parameter: prompt", "code": "VALIDATION_ERROR"},
    )


def test_pixazos_example_of_an_unknown_edit(http: httpx.Client) -> None:
    """The id is that of the document."""
    answer = http.post(RESULT_OF_EDIT, json={"request_id": f"{EDIT}_019dxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"})
    assert (answer.status_code, answer.json()) == (
        404,
        {"error": "Operation not found", "code": "NOT_FOUND"},
    )


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (
            Busy("busy", retry_after_s=60),
            {
                "error": {
                    "code": "RATE_LIMIT_EXCEEDED",
                    "message": "Rate limit exceeded. Retry after 60 seconds.",
                }
            },
        ),
        (
            server_error(),
            {"error": {"code": "INTERNAL_ERROR", "message": "Internal server error. Please retry later."}},
        ),
    ],
)
def test_pixazos_examples_of_rare_errors(error: RequestError, body: Any) -> None:
    assert json.loads(bytes(pixazo.error_response(error, {"path": SUBMIT}).body)) == body
