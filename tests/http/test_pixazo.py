"""Pixazo's API. Any HTTP client can use it."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.http.conftest import Endpoint
from tests.polling import until

IMAGE, EDIT = "glm-image", "glm-image-image-to-image"
SMALL = {"prompt": "a boat", "image_size": "square", "num_inference_steps": 2, "seed": 5}
UUID7 = "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
FIELDS = {
    *("request_id", "status", "polling_url", "output", "error", "images", "description"),
    *("created_at", "updated_at", "seed"),
}


@pytest.fixture
def http(vendors: Endpoint) -> Iterator[httpx.Client]:
    with vendors.client(ocp_apim_subscription_key=vendors.key) as client:
        yield client


def submit(http: httpx.Client, kind: str = IMAGE, wait_s: int | None = None, **fields: Any) -> Any:
    headers = {} if wait_s is None else {"Prefer": f"respond-async, wait={wait_s}"}
    answer = http.post(f"/{kind}/v1/{kind}-request", json=SMALL | fields, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("preference-applied") == (None if wait_s is None else f"wait={wait_s}")
    assert answer.json().keys() == FIELDS
    return answer.json()


def test_every_result_route_returns_the_same_result(http: httpx.Client) -> None:
    queued = submit(http, num_images=2)
    request_id = queued["request_id"]
    assert re.fullmatch(f"glm-image_{UUID7}", request_id)
    assert (queued["status"], queued["images"], queued["output"]) == ("QUEUED", [], None)
    assert (queued["error"], queued["description"], queued["seed"]) == (None, "", 5)
    until(lambda: http.get(queued["polling_url"]).json()["status"] not in ("QUEUED", "PROCESSING"))
    done = http.get(queued["polling_url"]).json()
    assert done["status"] == "COMPLETED"
    assert done["output"] == {"media_url": [image["url"] for image in done["images"]]}
    assert len(done["images"]) == 2
    assert {(image["content_type"], image["width"]) for image in done["images"]} == {("image/jpeg", 512)}
    assert all(image["url"].endswith(image["file_name"]) for image in done["images"])
    assert datetime.fromisoformat(done["created_at"]) < datetime.fromisoformat(done["updated_at"])
    body = f'{{"request_id": "{request_id}"}}'
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # curl's default
    result = f"/{IMAGE}/v1/{IMAGE}-request-result"
    for answer in (
        http.post(queued["polling_url"]),
        http.post(queued["polling_url"], content=body, headers=form),
        http.post(result, content=body),
        http.get(result, params={"request_id": request_id}),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.json() == done


def test_a_client_can_wait_for_the_result(http: httpx.Client) -> None:
    assert submit(http, wait_s=60)["status"] == "COMPLETED"
    unfinished = submit(http, wait_s=0, num_inference_steps=100)
    assert unfinished["status"] in ("QUEUED", "PROCESSING")
    inline = submit(http, wait_s=60, sync_mode=True, output_format="png")
    assert inline["output"]["media_url"][0].startswith("data:image/png;base64,")


def test_an_edit_has_its_own_ids_and_routes(http: httpx.Client) -> None:
    source = submit(http, wait_s=60)["images"][0]["url"]
    done = submit(http, EDIT, 60, image_urls=[source])
    request_id = done["request_id"]
    assert done["status"] == "COMPLETED"
    assert re.fullmatch(f"{EDIT}_{UUID7}", request_id)
    assert http.get(f"/v2/requests/status/{request_id}").json() == done
    assert http.post(f"/{EDIT}/v1/{EDIT}-request-result", json={"request_id": request_id}).json() == done
    other_route = http.post(f"/{IMAGE}/v1/{IMAGE}-request-result", json={"request_id": request_id})
    assert (other_route.status_code, other_route.json()["error"]["code"]) == (404, "NOT_FOUND")


def test_an_invalid_source_url_is_rejected(vendors: Endpoint, http: httpx.Client) -> None:
    body = SMALL | {"image_urls": ["https://localhost/boat.png"]}
    refused = http.post(f"/{EDIT}/v1/{EDIT}-request", json=body)
    assert (refused.status_code, refused.json()["code"]) == (400, "VALIDATION_ERROR")
    assert refused.json()["error"].startswith("image_urls ")


@pytest.mark.parametrize(
    "body", ['{"request_id": "glm-image_another"}', '{"request_id": 7}', '{"id": "x"}', "{", "[]"]
)
def test_a_body_that_contradicts_the_url_is_rejected(http: httpx.Client, body: str) -> None:
    queued = submit(http)
    answer = http.post(queued["polling_url"], content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_PARAMETER")


@pytest.mark.parametrize(
    "request_id", ["x", f"{IMAGE}_x", f"{EDIT}_01a20ca2-4fb3-7379-bb05-17c2842cbc3c", "%00", "_"]
)
def test_an_unknown_request_is_a_404(http: httpx.Client, request_id: str) -> None:
    for answer in (
        http.get(f"/v2/requests/status/{request_id}"),
        http.get(f"/{IMAGE}/v1/{IMAGE}-request-result", params={"request_id": request_id}),
    ):
        assert answer.status_code == 404
        assert answer.json() == {"error": {"code": "NOT_FOUND", "message": "Operation not found"}}


def test_a_request_of_another_key_is_a_404(vendors: Endpoint, http: httpx.Client) -> None:
    queued = submit(http)
    with vendors.client(authorization=f"Bearer {vendors.other_key}") as another:
        assert another.get(queued["polling_url"]).status_code == 404
