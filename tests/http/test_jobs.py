"""Jobs from the client's side: submission, events, results, cancellation and ownership."""

import base64
import uuid
from typing import Any

import httpx
import pytest

from tests.http.conftest import Endpoint
from tests.job_client import PATH, SMALL, ended, submit
from tests.pictures import picture


def test_edit_jobs_are_accepted_as_form_and_as_json(client: httpx.Client) -> None:
    fields = SMALL | {"num_inference_steps": "2", "seed": "3"}
    by_form = client.post(PATH, data=fields, files={"image": picture((200, 0, 0))})
    assert by_form.status_code == 202, by_form.text
    url = f"data:image/png;base64,{base64.b64encode(picture((200, 0, 0))).decode()}"
    by_json = submit(client, seed=3, images=[{"image_url": url}])
    (one,), (other,) = (ended(client, job)["result"]["data"] for job in (by_form.json(), by_json))
    direct = client.post("/v1/images/edits", data=fields, files={"image": picture((200, 0, 0))}).json()
    files = [client.get(image["url"]).content for image in (one, other, direct["data"][0])]
    assert files[0] == files[1] == files[2]


def test_a_job_supports_the_output_options(client: httpx.Client) -> None:
    done = ended(client, submit(client, response_format="b64_json", output_format="webp", quality="low"))
    (image,) = done["result"]["data"]
    assert base64.b64decode(image["b64_json"])[8:12] == b"WEBP"
    assert done["result"]["output_format"] == "webp"
    assert done["result"].get("quality") is None, "quality is unset because the request sets the steps"


def test_an_idempotency_key_creates_one_job(client: httpx.Client) -> None:
    key = str(uuid.uuid4())
    job = submit(client, key)
    replayed = client.post(PATH, json=SMALL, headers={"Idempotency-Key": key})
    assert replayed.json()["id"] == job["id"]
    assert replayed.headers["idempotent-replayed"] == "true"
    other = client.post(PATH, json=SMALL | {"seed": 1}, headers={"Idempotency-Key": key})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    ended(client, job)


def test_job_lists_are_paginated(client: httpx.Client) -> None:
    ids = [submit(client)["id"] for _ in range(3)]
    page = client.get(PATH, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1]
    assert page["has_more"]
    next_page = client.get(PATH, params={"limit": 1, "after": ids[1]}).json()
    assert [job["id"] for job in next_page["data"]] == ids[:1]
    for job_id in ids:
        ended(client, {"id": job_id})
    done = client.get(PATH, params={"status": "succeeded", "limit": 100}).json()["data"]
    assert {*ids} <= {job["id"] for job in done}
    assert "result" not in done[0]
    assert client.get(PATH, params={"status": "done"}).status_code == 400
    assert client.get(PATH, params={"limit": 101}).status_code == 400


def test_a_job_is_visible_only_to_its_key(guarded: Endpoint) -> None:
    mine, others = (
        httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        for key in (guarded.key, guarded.other_key)
    )
    with mine, others:
        job = submit(mine)
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            assert others.request(method, f"{PATH}/{job['id']}{path}").status_code == 404
        assert job["id"] not in others.get(PATH).text
        assert others.get(PATH, params={"after": job["id"]}).status_code == 404
        assert httpx.get(f"{guarded.url}{PATH}/{job['id']}").status_code == 401
        assert httpx.post(f"{guarded.url}{PATH}", json=SMALL).status_code == 401
        assert ended(mine, job)["status"] == "succeeded"
        assert httpx.get(f"{guarded.url}/.well-known/jwks.json").status_code == 200


def test_a_load_failure_fails_the_job(guarded: Endpoint) -> None:
    headers = {"Authorization": f"Bearer {guarded.key}"}
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=120) as client:
        done = ended(client, submit(client, model="broken"))
    assert done["status"] == "failed"
    assert done["error"]["code"] == "model_loading_failed"


def test_a_job_that_does_not_start_in_time_fails(client: httpx.Client) -> None:
    others = [submit(client, n=10, num_inference_steps=20) for _ in range(1)]
    late = ended(client, submit(client, start_within_s=0.1, priority="low"))
    assert (late["status"], late["error"]["code"]) == ("failed", "start_timeout")
    for job in others:
        client.delete(f"{PATH}/{job['id']}")
        ended(client, job)


def rejected(client: httpx.Client, **fields: Any) -> Any:
    answer = client.post(PATH, json=SMALL | fields)
    assert 400 <= answer.status_code < 500, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"priority": "high"}, "priority"),
        ({"start_within_s": 0}, "start_within_s"),
        ({"webhook_url": "ftp://example.com"}, "webhook_url"),
        ({"webhook_url": "http://127.0.0.1:9/"}, "webhook_url"),
        ({"webhook_url": "http://localhost:9/"}, "webhook_url"),
        ({"webhook_url": "http://user:pass@example.com/"}, "webhook_url"),
        ({"webhook_url": "http://[::1]/\r\nX: y"}, "webhook_url"),
        ({"webhook_url": "http://example.com/\0"}, "webhook_url"),
        ({"webhook_url": "http://example.com/" + "x" * 2048}, "webhook_url"),
        ({"images": []}, "images"),
        ({"images": [{"image_url": "data:image/png;base64,AAAA"}]}, "images"),
        ({"size": "100x100"}, "size"),
        ({"model": "none"}, "model"),
        ({"n": 11}, "n"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_invalid_jobs_are_rejected(client: httpx.Client, fields: Any, param: str) -> None:
    before = client.get(PATH, params={"limit": 1}).json()
    assert rejected(client, **fields)["param"] == param
    assert client.get(PATH, params={"limit": 1}).json() == before


def test_an_unsupported_method_gets_an_allow_header(client: httpx.Client) -> None:
    for path, methods in ((PATH, "GET, POST"), (f"{PATH}/some-id", "DELETE, GET"), ("/livez", "GET")):
        answer = client.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


@pytest.mark.parametrize("key", ["x" * 256, ""])
def test_an_idempotency_key_of_invalid_length_is_rejected(client: httpx.Client, key: str) -> None:
    assert client.post(PATH, json=SMALL, headers={"Idempotency-Key": key}).status_code == 400


@pytest.mark.parametrize(
    "job_id", ["none", "../generations", "%00", "x" * 5000, f"{uuid.UUID(int=0, version=4)}"]
)
@pytest.mark.parametrize("path", ["", "/events"])
def test_an_unknown_job_is_an_error(client: httpx.Client, job_id: str, path: str) -> None:
    answer = client.get(f"{PATH}/{job_id}{path}")
    assert answer.status_code in (404, 405), answer.text
    assert answer.json()["error"]["message"]
