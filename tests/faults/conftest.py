"""HTTP client for the fault tests."""

import base64
import io
from contextlib import suppress
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from deployments.types import Pixels
from tests.serve.conftest import Running

SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2, "response_format": "b64_json"}


class Client:
    """HTTP client that several threads may share."""

    def __init__(self, running: Running) -> None:
        self.running = running
        # The server could close an idle connection just as another thread reuses it.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=running.url, timeout=300, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def post(self, path: str) -> httpx.Response:
        return self._http.post(path)

    def ask(
        self, *, timeout: httpx.Timeout | float = 300, request_id: str | None = None, **fields: Any
    ) -> httpx.Response:
        """Requests a small image, which takes half a second. The fields override the defaults."""
        headers = {"X-Request-ID": request_id} if request_id else {}
        return self._http.post(
            "/v1/images/generations", json=SMALL | fields, headers=headers, timeout=timeout
        )

    def pixels(self, answer: httpx.Response) -> Pixels:
        (image,) = answer.json()["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))

    def status(self) -> Any:
        return self.get("/v1/internal/status").json()

    def stages(self, model: str) -> dict[str, Any]:
        """Returns the model's stages as `/health` reports them."""
        stages: dict[str, Any] = self.get("/health").json()["models"][model]
        return stages

    def working(self) -> list[str]:
        """Returns the stage of each unit."""
        return [unit["stage"] for unit in self.status()["units"]]


def first_refused(client: Client) -> httpx.Response:
    """Sends requests until one is rejected, and returns that response. It does not wait for images."""
    for _ in range(100):
        with suppress(httpx.ReadTimeout):
            answer = client.ask(timeout=httpx.Timeout(10, read=0.3))
            if answer.status_code != 200:
                return answer
    raise AssertionError("the server still accepts requests")
