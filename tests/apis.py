"""One image by each API: the same parameters in the words of each."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from deployments.types import Pixels
from tests.polling import until

FAL = {"image_size": "square", "output_format": "png"}


class RefusedError(AssertionError):
    """An answer that is not a success.

    Attributes:
        status: its status code.
        body: its body.
    """

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(f"{answer.request.url.path}: {answer.status_code} {answer.text}")
        self.status = answer.status_code
        self.body = answer.text


@dataclass(frozen=True)
class Asked:
    """An image of 512×512 pixels. With a source, which is a data URL, it is an edit."""

    prompt: str
    seed: int
    steps: int
    source: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that all APIs share."""
        return {"prompt": self.prompt, "num_inference_steps": self.steps, "seed": self.seed}


def posted(http: httpx.Client, path: str, body: Any, **headers: str) -> Any:
    answer = http.post(path, json=body, headers=headers)
    if answer.status_code not in (200, 202):
        raise RefusedError(answer)
    return answer.json()


def polled(http: httpx.Client, url: str, is_done: Callable[[Any], bool]) -> Any:
    answers: list[Any] = []

    def done() -> bool:
        answer = http.get(url)
        if answer.status_code not in (200, 202):
            raise RefusedError(answer)
        answers[:] = [answer.json()]
        return is_done(answers[0])

    until(done)
    return answers[0]


def failed(http: httpx.Client, body: Any) -> RefusedError:
    """Returns the error for a job that has failed, in the words of its API."""
    request = httpx.Request("GET", http.base_url)
    return RefusedError(httpx.Response(500, json=body, request=request))


def by_openai(http: httpx.Client, asked: Asked) -> str:
    if asked.source:
        body = asked.fields | {"images": [{"image_url": asked.source}]}
        return str(posted(http, "/v1/images/edits", body)["data"][0]["url"])
    body = asked.fields | {"size": "512x512", "response_format": "b64_json"}
    made = posted(http, "/v1/images/generations", body)
    return f"data:image/png;base64,{made['data'][0]['b64_json']}"


def by_a_stream(http: httpx.Client, asked: Asked) -> str:
    body = asked.fields | {"size": "512x512", "stream": True, "partial_images": 1}
    last: Any = None
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            raise RefusedError(answer)
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
    if last is None or last.get("type") != "image_generation.completed":
        raise failed(http, last)
    return f"data:image/png;base64,{last['b64_json']}"


def by_a_job(http: httpx.Client, asked: Asked) -> str:
    images = {"images": [{"image_url": asked.source}]} if asked.source else {"size": "512x512"}
    job = posted(http, "/v1/images/jobs", asked.fields | images)
    running = ("queued", "running")
    done = polled(http, f"/v1/images/jobs/{job['id']}", lambda job: job["status"] not in running)
    if done["status"] != "succeeded":
        raise failed(http, done)
    return str(done["result"]["data"][0]["url"])


def by_fal(http: httpx.Client, asked: Asked) -> str:
    path, body = "/fal-ai/glm-image", asked.fields | FAL
    if asked.source:
        edit = body | {"image_urls": asked.source}
        return str(posted(http, f"{path}/image-to-image", edit)["images"][0]["url"])
    whole = {"image_size": {"width": 512.0, "height": 512.0}, "num_inference_steps": float(asked.steps)}
    return str(posted(http, path, body | {"sync_mode": True} | whole)["images"][0]["url"])


def by_fals_queue(http: httpx.Client, asked: Asked) -> str:
    queued = posted(http, "/queue/fal-ai/glm-image", asked.fields | FAL)
    polled(http, queued["status_url"], lambda status: status["status"] == "COMPLETED")
    made = http.get(queued["response_url"])
    if made.status_code != 200:
        raise RefusedError(made)
    return str(made.json()["images"][0]["url"])


def by_zai(http: httpx.Client, asked: Asked) -> str:
    body = asked.fields | {"model": "glm-image", "size": "512x512"}
    return str(posted(http, "/api/paas/v4/images/generations", body)["data"][0]["url"])


def by_zais_task(http: httpx.Client, asked: Asked) -> str:
    body = asked.fields | {"model": "glm-image", "size": "512x512", "response_format": "b64_json"}
    task = posted(http, "/api/paas/v4/async/images/generations", body)
    url = f"/api/paas/v4/async-result/{task['id']}"
    done = polled(http, url, lambda task: task["task_status"] != "PROCESSING")
    if done["task_status"] != "SUCCESS":
        raise failed(http, done)
    return f"data:image/png;base64,{done['image_result'][0]['b64_json']}"


def by_pixazo(http: httpx.Client, asked: Asked) -> str:
    if asked.source:
        edit = "glm-image-image-to-image"
        body = asked.fields | FAL | {"image_urls": [asked.source], "sync_mode": True}
        made = posted(http, f"/{edit}/v1/{edit}-request", body, prefer="wait=60")
        if not made.get("images"):
            raise failed(http, made)
        return str(made["images"][0]["url"])
    made = posted(http, "/glm-image/v1/glm-image-request", asked.fields | FAL, prefer="wait=60")
    if made["status"] != "COMPLETED":
        raise failed(http, made)
    return str(made["output"]["media_url"][0])


By = Callable[[httpx.Client, Asked], str]
APIS: tuple[By, ...] = (
    by_openai,
    by_a_stream,
    by_a_job,
    by_fal,
    by_fals_queue,
    by_zai,
    by_zais_task,
    by_pixazo,
)
"""Functions that make an image and return its URL, which may be a data URL."""
EDITING: tuple[By, ...] = (by_openai, by_a_job, by_fal, by_pixazo)
"""Those that also make edits."""


def pixels(http: httpx.Client, url: str) -> Pixels:
    """Returns the image at a URL of `APIS`."""
    if url.startswith("data:"):
        data = base64.b64decode(url.partition(",")[2])
    else:
        answer = http.get(url)
        if answer.status_code != 200:
            raise RefusedError(answer)
        data = answer.content
    return np.asarray(Image.open(io.BytesIO(data)))
