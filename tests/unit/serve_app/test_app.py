"""The wiring, over stand-ins for Ray Serve's handles: errors and disconnections at the stages."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.types import PriorTokens
from serve_app import app as app_module
from serve_app.app import Ingress, is_news
from serve_app.config import AppConfig
from tests.pictures import picture

TOKENS = PriorTokens(target=np.zeros((32, 32), dtype=np.int64))
PIXELS = np.zeros((1024, 1024, 3), dtype=np.uint8)


class Items:
    """The answer of a streaming handle: one item, an error, or nothing for ever."""

    def __init__(self, item: Any) -> None:
        self._item = item
        self._error: BaseException | None = None
        self.begun = asyncio.Event()
        self.cancelled = False

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> Any:
        self.begun.set()
        item, self._item = self._item, StopAsyncIteration()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item if item is not None else await asyncio.Future[Any]()

    def cancel(self) -> None:
        if self._error:
            raise self._error  # as Serve's does
        self.cancelled = True


class Method:
    """A method of a Serve handle. Each call gets the next answer."""

    def __init__(self, *items: Any) -> None:
        self.answers = [Items(item) for item in items]
        self.arguments: list[tuple[Any, ...]] = []

    @property
    def calls(self) -> int:
        return len(self.arguments)

    def options(self, *, stream: bool) -> "Method":
        assert stream
        return self

    def remote(self, *arguments: Any) -> Items:
        self.arguments.append(arguments)
        return self.answers[self.calls - 1]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppConfig:
    context = SimpleNamespace(replica_tag="ingress", deployment="Ingress", app_name="app")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    monkeypatch.setattr(app_module, "ActorClient", lambda *_: None)  # it would start an actor
    cpu = {"device": "cpu"}
    model = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": cpu, "decoder": cpu}
    return AppConfig.model_validate(
        {
            "models": [model],
            "auth": {"open": True},
            "storage": {"url": str(tmp_path / "files"), "min_free_bytes": 0},
            "database": {"url": f"sqlite:///{tmp_path}/jobs.db"},
        }
    )


async def ask(config: AppConfig, prior: Method, decoder: Method, *sources: bytes) -> httpx.Response:
    stages: Any = {
        "m": {"prior": SimpleNamespace(generate=prior), "decoder": SimpleNamespace(decode=decoder)}
    }
    transport = httpx.ASGITransport(Ingress(config, stages).__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = {"prompt": "a boat", "response_format": "b64_json"}
        if sources:
            return await client.post(
                "/v1/images/edits", data=body, files=[("image", file) for file in sources]
            )
        return await client.post("/v1/images/generations", json=body)


def test_a_request_is_one_call_of_each_stage(config: AppConfig) -> None:
    async def main() -> None:
        prior, decoder = Method(TOKENS), Method(PIXELS)
        assert (await ask(config, prior, decoder)).status_code == 200
        assert (prior.calls, decoder.calls) == (1, 1)

    asyncio.run(main())


def test_source_images_are_put_into_rays_object_store_once(
    config: AppConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []

    def reference(pixels: Any) -> str:
        put.append(pixels)
        return "a reference"

    monkeypatch.setattr(ray, "put", reference)

    async def main() -> None:
        prior, decoder = Method(TOKENS), Method(PIXELS)
        assert (await ask(config, prior, decoder, picture(), picture("blue"))).status_code == 200
        assert [image.shape for image in put[0]] == [(512, 512, 3)] * 2
        assert len(put) == 1
        for ((request, sources),) in (prior.arguments, decoder.arguments):
            assert (request.sources, sources) == ((), "a reference")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "busy"),
        (DeploymentUnavailableError(DeploymentID("m-prior")), 503, "unavailable"),
    ],
)
def test_an_error_of_serve_is_an_answer_of_the_dialect(
    config: AppConfig, error: Exception, status: int, code: str
) -> None:
    async def main() -> httpx.Response:
        return await ask(config, Method(error), Method())

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "x-should-retry" not in answer.headers


def test_a_stage_whose_replica_dies_is_called_once_more(config: AppConfig) -> None:
    async def main() -> None:
        death = ActorDiedError()
        prior = Method(death, TOKENS)
        assert (await ask(config, prior, Method(PIXELS))).status_code == 200
        assert prior.calls == 2
        given_up = await ask(config, Method(death, death), Method())
        assert (given_up.status_code, given_up.json()["error"]["code"]) == (500, "replica_died")

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_client_that_disconnects_cancels_the_call_of_the_stage(config: AppConfig, stage: str) -> None:
    async def main() -> None:
        prior, decoder = Method(None if stage == "prior" else TOKENS), Method(None)
        (stuck,) = (prior if stage == "prior" else decoder).answers
        asking = asyncio.create_task(ask(config, prior, decoder))
        async with asyncio.timeout(20):
            await stuck.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert stuck.cancelled

    asyncio.run(main())


def test_only_warnings_that_say_something_new_are_logged() -> None:
    def line(message: str) -> logging.LogRecord:
        return logging.LogRecord("ray.serve", logging.WARNING, "", 1, message, None, None)

    assert not is_news(
        line("Failed to route request after 350 attempts over 9.81s. Retrying. Request ID: a.")
    )
    assert is_news(line("m's prior stage lost the replica that had the image; retrying the image"))
