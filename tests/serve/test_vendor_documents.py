"""The requests and answers that the vendors' documents print, with this server's address and keys.

fal: https://fal.ai/models/fal-ai/glm-image/image-to-image/llms.txt, Z.ai: https://docs.z.ai/guides/image/glm-image,
Pixazo: https://www.pixazo.ai/models/text-to-image/glm-image-api.
"""

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
from serve_app.errors import RequestError, server_error
from tests.conftest import needs_node
from tests.serve.conftest import ROOT, Vendors, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KITTEN = (
    "A cute little kitten sitting on a sunny windowsill, with the background of blue sky and white clouds."
)
MENU = (
    "An elegant watercolor menu card painted on textured cream paper, soft turquoise washes, golden accents, "
    "dreamy bokeh background, editorial photography style"
)
EDIT = "glm-image-image-to-image"
OPTIONS = {
    "image_size": "square_hd",
    "num_inference_steps": 30,
    "guidance_scale": 1.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
}
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


def covers(answer: Any, example: Any) -> bool:
    """Whether an answer has all that an example has, of the same kinds."""
    if isinstance(example, dict):
        return all(name in answer and covers(answer[name], value) for name, value in example.items())
    if isinstance(example, list):
        return len(answer) >= len(example) and all(covers(one, example[0]) for one in answer)
    return type(answer) is type(example)


@pytest.fixture
def http(vendors: Vendors) -> Iterator[httpx.Client]:
    with vendors.client(ocp_apim_subscription_key=vendors.key, cache_control="no-cache") as client:
        yield client


@pytest.fixture(scope="module")
def catwalk(vendors: Vendors) -> str:
    """Where the image is that the documents edit."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((1024, 1536)).save(file, "PNG")
    with vendors.client(authorization=f"Key {vendors.key}") as client:
        place = client.post("/storage/upload/initiate", json={"file_name": "catwalk.png"}).json()
        client.put(place["upload_url"], content=file.getvalue()).raise_for_status()
    return str(place["file_url"])


@pytest.fixture
def run(vendors: Vendors) -> Callable[..., str]:
    """Runs a program that finds the server and its key where the vendors' do, and returns what it prints."""

    def run(*command: str, cwd: Path = ROOT) -> str:
        keys = dict.fromkeys(("FAL_KEY", "ZAI_API_KEY", "TOKEN", "SUBSCRIPTION_KEY"), vendors.key)
        places = {"ZAI_BASE_URL": f"{vendors.url}/api/paas/v4", "CURL_CA_BUNDLE": str(vendors.certificate)}
        return subprocess.run(
            command,
            env=os.environ | vendors.environment | keys | places,
            cwd=cwd,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    return run


def size(http: httpx.Client, url: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(http.get(url).content)).size


def test_fals_examples_of_a_body(http: httpx.Client, catwalk: str) -> None:
    required = {"prompt": "Make the dress red.", "image_urls": catwalk}
    for body in (required, required | OPTIONS):
        answer = http.post("/fal-ai/glm-image/image-to-image", json=body)
        assert answer.status_code == 200, answer.text
        made = answer.json()
        assert covers(made, FALS_IMAGES)
        assert made.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
        assert size(http, made["images"][0]["url"]) == (1024, 1024)


def test_fals_example_with_curl(run: Callable[..., str], vendors: Vendors, catwalk: str) -> None:
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
    assert covers(json.loads(printed), FALS_IMAGES)


def test_fals_example_in_python(run: Callable[..., str], catwalk: str) -> None:
    printed = run(
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
    )
    assert "image 0: prior stage" in printed
    assert "'has_nsfw_concepts': [False]" in printed


@needs_node
def test_fals_example_in_javascript(run: Callable[..., str], vendors: Vendors, catwalk: str) -> None:
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
    printed = run("node", "--input-type=module", "-e", program, cwd=ROOT / "tests/serve/js").splitlines()
    assert any(line.startswith("began ") for line in printed)
    assert covers(json.loads(printed[-2]), FALS_IMAGES)
    assert len(printed[-1]) == 36


def test_zais_example_with_curl(run: Callable[..., str], vendors: Vendors, http: httpx.Client) -> None:
    printed = run(
        "bash",
        "-c",
        f"""curl --request POST \\
    --url {vendors.url}/api/paas/v4/images/generations \\
    --header "Authorization: Bearer $TOKEN" \\
    --header 'Content-Type: application/json' \\
    --data '{{
        "model": "glm-image",
        "prompt": "{KITTEN}",
        "size": "1280x1280"
    }}'
""",
    )
    assert size(http, json.loads(printed)["data"][0]["url"]) == (1280, 1280)


def test_zais_example_in_python(run: Callable[..., str], http: httpx.Client) -> None:
    printed = run(
        sys.executable,
        "-c",
        f"""
from zai import ZaiClient
client = ZaiClient()
response = client.images.generations(
    model="glm-image",
    prompt="{KITTEN}",
)
print(response.data[0].url)
""",
    )
    assert size(http, printed.strip()) == (1280, 1280)


def test_zais_example_in_java(vendors: Vendors, http: httpx.Client) -> None:
    """The request that it sends."""
    body = {"model": "glm-image", "prompt": KITTEN, "size": "1280x1280"}
    with vendors.client(authorization=f"Bearer {vendors.key}") as java:
        answer = java.post("/api/paas/v4/images/generations", json=body)
    assert size(http, answer.json()["data"][0]["url"]) == (1280, 1280)


def test_the_sizes_that_zai_recommends(http: httpx.Client) -> None:
    sizes = ("1280x1280", "1568x1056", "1056x1568", "1472x1088", "1088x1472", "1728x960", "960x1728")
    tasks = []
    for one in (*sizes, "512x512", "2048x512"):
        body = {"model": "glm-image", "prompt": "a boat", "size": one, "num_inference_steps": 1}
        tasks.append((one, http.post("/api/paas/v4/async/images/generations", json=body).json()["id"]))
    for one, task in tasks:
        url = f"/api/paas/v4/async-result/{task}"
        until(lambda url=url: http.get(url).json()["task_status"] == "SUCCESS", 120)  # type: ignore[misc]
        width, height = size(http, http.get(url).json()["image_result"][0]["url"])
        assert f"{width}x{height}" == one


def test_pixazos_example_with_curl(run: Callable[..., str], vendors: Vendors, http: httpx.Client) -> None:
    options = json.dumps({"prompt": MENU} | OPTIONS, indent=0)
    submitted = json.loads(
        run(
            "bash",
            "-c",
            f"""curl -X POST "{vendors.url}/glm-image/v1/glm-image-request" \\
-H "Content-Type: application/json" \\
-H "Cache-Control: no-cache" \\
-H "Ocp-Apim-Subscription-Key: $SUBSCRIPTION_KEY" \\
--data-raw '{options}'
""",
        )
    )
    request_id = submitted["request_id"]
    assert submitted["status"] == "QUEUED"
    until(lambda: http.get(f"/v2/requests/status/{request_id}").json()["status"] == "COMPLETED")
    printed = run(
        "bash",
        "-c",
        f"""curl -X POST "{vendors.url}/v2/requests/status/{request_id}" \\
-H "Ocp-Apim-Subscription-Key: $SUBSCRIPTION_KEY" \\
--data-raw '{{
"request_id": "{request_id}"
}}'
""",
    )
    done = json.loads(printed)
    assert covers(done, PIXAZOS_IMAGES)
    assert done["description"] == ""
    assert size(http, done["output"]["media_url"][0]) == (1024, 1024)


def test_pixazos_examples_in_python_and_javascript(http: httpx.Client) -> None:
    """The requests that they send; asked to wait, the server answers with the images as printed."""
    for body in ({"prompt": MENU}, {"prompt": MENU} | OPTIONS):
        path = "/glm-image/v1/glm-image-request"
        done = http.post(path, json=body, headers={"Prefer": "wait=60"}).json()
        assert covers(done, PIXAZOS_IMAGES)
        status = f"/v2/requests/status/{done['request_id']}"
        assert http.post(status, json={"request_id": done["request_id"]}).json() == done


def test_pixazos_example_with_all_options_waits_for_an_expander(http: httpx.Client) -> None:
    body = {"prompt": MENU} | OPTIONS | {"seed": 42, "sync_mode": False}
    refused = http.post("/glm-image/v1/glm-image-request", json=body | {"enable_prompt_expansion": True})
    assert refused.status_code == 400
    assert "enable_prompt_expansion" in refused.json()["error"]["message"]
    taken = http.post("/glm-image/v1/glm-image-request", json=body | {"enable_prompt_expansion": False})
    assert (taken.status_code, taken.json()["seed"]) == (200, 42)


@pytest.mark.parametrize(
    "options", [{}, OPTIONS | {"seed": 42, "sync_mode": False, "enable_prompt_expansion": False}]
)
def test_pixazos_examples_of_an_edit(http: httpx.Client, catwalk: str, options: dict[str, Any]) -> None:
    body = {"prompt": "Make the dress red.", "image_urls": [catwalk]} | options
    request_id = http.post(f"/{EDIT}/v1/{EDIT}-request", json=body).json()["request_id"]
    result = f"/{EDIT}/v1/{EDIT}-request-result"

    def answer() -> Any:
        return http.post(result, json={"request_id": request_id}).json()

    until(lambda: answer()["status"] not in ("QUEUED", "PROCESSING"))
    assert answer()["status"] == "COMPLETED"
    assert covers(answer(), PIXAZOS_IMAGES)


def test_pixazos_examples_of_errors(vendors: Vendors, http: httpx.Client) -> None:
    path = "/glm-image/v1/glm-image-request"
    invalid = http.post(path, json={"prompt": MENU, "image_size": "invalid_size"})
    assert invalid.status_code == 400
    assert invalid.json()["error"]["code"] == "INVALID_PARAMETER"
    assert invalid.json()["error"]["message"].startswith("Invalid image_size value: invalid_size")
    with vendors.client() as stranger:
        for key in ({}, {"Ocp-Apim-Subscription-Key": "wrong"}):
            unknown = stranger.post(path, json={"prompt": MENU}, headers=key)
            assert (unknown.status_code, unknown.json()) == (
                401,
                {
                    "error": {
                        "code": "UNAUTHORIZED",
                        "message": "Missing or invalid Ocp-Apim-Subscription-Key header",
                    }
                },
            )
    missing = http.post(f"/{EDIT}/v1/{EDIT}-request", json={"image_urls": ["https://example.com/a.png"]})
    assert (missing.status_code, missing.json()) == (
        400,
        {"error": "Missing required parameter: prompt", "code": "VALIDATION_ERROR"},
    )
    nowhere = http.post(f"/{EDIT}/v1/{EDIT}-request-result", json={"request_id": f"{EDIT}_019dxxxx"})
    assert (nowhere.status_code, nowhere.json()) == (
        404,
        {"error": "Operation not found", "code": "NOT_FOUND"},
    )


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (
            RequestError("busy", code="busy", status=429, headers={"Retry-After": "60"}),
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
def test_pixazos_examples_of_errors_that_are_rare(error: RequestError, body: Any) -> None:
    assert json.loads(bytes(pixazo.nested_error_response(error).body)) == body
