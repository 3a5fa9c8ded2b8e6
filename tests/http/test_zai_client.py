"""The official `zai-sdk` with another base URL: synchronous requests, tasks, keys and tokens."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from zai import ZaiClient, ZhipuAiClient, core

from tests.http.conftest import Endpoint
from tests.polling import until

SMALL: dict[str, Any] = {
    "prompt": "a boat",
    "size": "512x512",
    "extra_body": {"num_inference_steps": 2, "seed": 5},
}
Make = Callable[..., ZaiClient]


@pytest.fixture
def make(vendors: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setenv("SSL_CERT_FILE", str(vendors.certificate))
    clients: list[ZaiClient] = []

    def client(kind: type[ZaiClient] = ZaiClient, **options: Any) -> ZaiClient:
        given = {"api_key": vendors.key, "base_url": f"{vendors.url}/api/paas/v4"} | options
        clients.append(kind(**given))
        return clients[-1]

    yield client
    for one in clients:
        one.close()  # type: ignore[no-untyped-call]


def size(vendors: Endpoint, url: str) -> tuple[int, int]:
    with vendors.client() as anonymous:
        return Image.open(io.BytesIO(anonymous.get(url).content)).size


def test_generations_return_images(make: Make, vendors: Endpoint) -> None:
    made = make().images.generations(model="glm-image", n=2, quality="standard", request_id="mine", **SMALL)
    assert [size(vendors, image.url or "") for image in made.data] == [(512, 512), (512, 512)]
    extra = made.model_extra or {}
    assert extra["request_id"] == "mine"
    assert extra["content_filter"] == [{"role": "assistant", "level": 3}]
    assert extra["id"]


def test_images_can_be_returned_as_base64(make: Make) -> None:
    made = make(ZhipuAiClient).images.generations(model="glm-image", response_format="b64_json", **SMALL)
    assert made.data[0].url is None
    assert made.data[0].b64_json


def test_a_task_runs_asynchronously(make: Make, vendors: Endpoint) -> None:
    client = make()
    task = client.images.async_generations(model="glm-image", user_id="user-1", **SMALL)
    assert (task.model, task.task_status) == ("glm-image", "PROCESSING")
    assert task.request_id == task.id
    until(lambda: client.images.retrieve_images_result(task.id or "").task_status != "PROCESSING")
    done = client.images.retrieve_images_result(task.id or "")
    assert (done.task_status, done.request_id) == ("SUCCESS", task.id)
    assert done.image_result
    assert size(vendors, done.image_result[0].url or "") == (512, 512)


def test_a_failed_task_returns_its_error(make: Make) -> None:
    client = make()
    task = client.images.async_generations(model="broken", request_id="mine", **SMALL)
    until(lambda: client.images.retrieve_images_result(task.id or "").task_status == "FAIL")
    done = client.images.retrieve_images_result(task.id or "")
    assert done.request_id == "mine"
    assert "Model loading failed" in (done.model_extra or {})["error"]["message"]


def test_a_token_signed_with_the_key_is_accepted(make: Make, vendors: Endpoint) -> None:
    client = make(api_key=vendors.other_key, disable_token_cache=False)
    assert client.images.generations(model="glm-image", **SMALL).data[0].url
    assert make(api_key=vendors.other_key).images.generations(model="glm-image", **SMALL).data[0].url


@pytest.mark.parametrize("key", ["wrong", "0123456789abcdef.another-secret-of-thirty-two-bytes-or-more"])
def test_a_wrong_key_raises(make: Make, key: str) -> None:
    for is_plain in (True, False):
        if not is_plain and "." not in key:
            continue
        with pytest.raises(core.APIAuthenticationError, match="1002"):
            make(api_key=key, disable_token_cache=is_plain).images.generations(model="glm-image", **SMALL)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"model": "cogview"}, "1211"),
        ({"model": core.NOT_GIVEN}, "1213"),
        ({"size": "513x512"}, "1214"),
        ({"size": "big"}, "1214"),
        ({"quality": "best"}, "1214"),
        ({"n": 0}, "1214"),
        ({"user_id": "short"}, "1214"),
        ({"watermark_enabled": True}, "1214"),
        ({"sensitive_word_check": {"type": "SOME"}}, "1214"),
        ({"prompt": "  "}, "1214"),
    ],
)
def test_invalid_input_raises_without_a_retry(
    make: Make, sent: list[str], wrong: dict[str, Any], code: str
) -> None:
    with pytest.raises(core.APIRequestFailedError, match=f'"code":"{code}"') as caught:
        make().images.generations(**{"model": "glm-image", **SMALL, **wrong})
    assert caught.value.response.json()["error"]["message"]
    assert len(sent) == 1


def test_a_load_failure_is_not_retried(make: Make, sent: list[str]) -> None:
    with pytest.raises(core.APIInternalError, match="Model loading failed"):
        make().images.generations(model="broken", **SMALL)
    assert len(sent) == 1


def test_an_unknown_task_is_a_404(make: Make) -> None:
    with pytest.raises(core.APIStatusError) as caught:
        make().images.retrieve_images_result("01a20ca2-4fb3-7379-bb05-17c2842cbc3c")
    assert caught.value.status_code == 404


def test_parameters_without_an_effect_are_accepted(make: Make) -> None:
    made = make().images.generations(
        model="glm-image",
        style="vivid",
        user="somebody",
        sensitive_word_check={"type": "ALL", "status": "DISABLE"},
        watermark_enabled=False,
        **SMALL,
    )
    assert made.data[0].url
