"""Jobs as their users have them: submitted, followed, fetched, cancelled, and theirs alone."""

import base64
import io
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.types import Pixels
from tests.serve.conftest import Guarded, Server, Upstream, until

PATH = "/v1/images/jobs"
SMALL = {"prompt": "a boat", "size": "512x512", "num_inference_steps": 2}


def submit(client: httpx.Client, key: str | None = None, **fields: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    answer = client.post(PATH, json=SMALL | fields, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def ended(client: httpx.Client, job: Any) -> Any:
    """The job when it has ended."""
    return list(events(client, job))[-1]["data"]


def events(client: httpx.Client, job: Any, seen: str = "") -> Iterator[dict[str, Any]]:
    """The job's events, as a browser's EventSource would have them."""
    headers = {"Last-Event-ID": seen} if seen else {}
    with client.stream("GET", f"{PATH}/{job['id']}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name:
                event[name] = json.loads(value) if name == "data" else value
            elif event:
                yield event
                event = {}


def pixels(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (512, 512), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_job_makes_what_the_same_request_makes(
    client: httpx.Client, server: Server, upstream: Callable[[Path], Upstream]
) -> None:
    answer = client.post(PATH, json=SMALL | {"seed": 41, "n": 2})
    assert answer.status_code == 202
    job = answer.json()
    assert (job["object"], job["seed"], job["n"], job["size"]) == ("image.job", 41, 2, "512x512")
    assert answer.headers["location"] == f"{server.url}{PATH}/{job['id']}"
    done = ended(client, job)
    assert (done["status"], done["progress"]) == ("succeeded", 1)
    paint = upstream(server.checkpoints["glm-image"])
    for i, image in enumerate(done["result"]["data"]):
        assert image["seed"] == 41 + i
        made = pixels(client.get(image["url"]).content)
        assert np.array_equal(made, paint("a boat", 512, 512, seed=41 + i))
    assert done == client.get(answer.headers["location"]).json()
    direct = client.post("/v1/images/generations", json=SMALL | {"seed": 41, "n": 2}).json()
    assert direct.keys() == done["result"].keys()
    assert direct["usage"] == done["result"]["usage"]


def test_an_edit_is_a_job_too_by_form_and_by_json(client: httpx.Client) -> None:
    fields = SMALL | {"num_inference_steps": "2", "seed": "3"}
    by_form = client.post(PATH, data=fields, files={"image": picture(200)})
    assert by_form.status_code == 202, by_form.text
    url = f"data:image/png;base64,{base64.b64encode(picture(200)).decode()}"
    by_json = submit(client, seed=3, images=[{"image_url": url}])
    (one,), (other,) = (ended(client, job)["result"]["data"] for job in (by_form.json(), by_json))
    direct = client.post("/v1/images/edits", data=fields, files={"image": picture(200)}).json()
    files = [client.get(image["url"]).content for image in (one, other, direct["data"][0])]
    assert files[0] == files[1] == files[2]


def test_what_an_answer_may_be_a_result_may_be(client: httpx.Client) -> None:
    done = ended(client, submit(client, response_format="b64_json", output_format="webp", quality="low"))
    (image,) = done["result"]["data"]
    assert base64.b64decode(image["b64_json"])[8:12] == b"WEBP"
    assert done["result"]["output_format"] == "webp"
    assert done["result"].get("quality") is None, "the steps were given"


def test_events_tell_of_the_queue_the_stages_and_previews_and_go_on_where_they_broke(
    client: httpx.Client,
) -> None:
    job = submit(client, num_inference_steps=100, partial_images=2)  # so that the second one is told in time
    came = []
    previews = set()
    for event in events(client, job):
        came.append(event)
        for preview in event["data"].get("previews", ()):
            if preview["index"] not in previews:
                assert pixels(client.get(preview["url"]).content).size
                previews.add(preview["index"])
    assert previews == {0, 1}
    assert [event["event"] for event in came] == [event["data"]["status"] for event in came]
    seen = [stage["stage"] for event in came for stage in event["data"].get("images", ())]
    assert set(seen) >= {"prior", "decoder"}
    progress = [event["data"]["progress"] for event in came]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    marks = [event["id"] for event in came]
    assert len(set(marks)) == len(marks)
    assert [event["event"] for event in events(client, job, marks[1])] == ["succeeded"]
    assert list(events(client, job, marks[-1])) == []
    assert all(client.get(p["url"]).status_code == 404 for e in came for p in e["data"].get("previews", ()))


def test_a_running_job_is_cancelled(client: httpx.Client) -> None:
    job = submit(client, num_inference_steps=100, size="1024x1024")
    for event in events(client, job):
        if event["event"] == "running" and event["data"]["progress"]:
            asked = client.delete(f"{PATH}/{job['id']}")
            assert asked.status_code == 200
    assert event["event"] == "cancelled"
    until(lambda: client.get("/v1/internal/status").json()["units"] == [])
    assert client.delete(f"{PATH}/{job['id']}").json()["status"] == "cancelled"
    assert "result" not in client.get(f"{PATH}/{job['id']}").json()


def test_one_idempotency_key_is_one_job(client: httpx.Client) -> None:
    key = str(uuid.uuid4())
    job = submit(client, key)
    again = client.post(PATH, json=SMALL, headers={"Idempotency-Key": key})
    assert again.json()["id"] == job["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post(PATH, json=SMALL | {"seed": 1}, headers={"Idempotency-Key": key})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    ended(client, job)


def test_lists_come_by_the_page(client: httpx.Client) -> None:
    ids = [submit(client)["id"] for _ in range(3)]
    page = client.get(PATH, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1]
    assert page["has_more"]
    following = client.get(PATH, params={"limit": 1, "after": ids[1]}).json()
    assert [job["id"] for job in following["data"]] == ids[:1]
    for job_id in ids:
        ended(client, {"id": job_id})
    done = client.get(PATH, params={"status": "succeeded", "limit": 100}).json()["data"]
    assert {*ids} <= {job["id"] for job in done}
    assert "result" not in done[0]
    assert client.get(PATH, params={"status": "done"}).status_code == 400
    assert client.get(PATH, params={"limit": 101}).status_code == 400


def test_a_job_belongs_to_its_key(guarded: Guarded) -> None:
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


def test_a_model_that_cannot_be_loaded_fails_the_job_with_the_reason(guarded: Guarded) -> None:
    headers = {"Authorization": f"Bearer {guarded.key}"}
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=120) as client:
        done = ended(client, submit(client, model="broken"))
    assert done["status"] == "failed"
    assert done["error"]["code"] == "model_loading_failed"


def test_a_job_that_cannot_begin_in_its_time_fails(client: httpx.Client) -> None:
    waits_for = [submit(client, n=10, num_inference_steps=20) for _ in range(1)]
    late = ended(client, submit(client, start_within_s=0.1, priority="low"))
    assert (late["status"], late["error"]["code"]) == ("failed", "start_timeout")
    for job in waits_for:
        client.delete(f"{PATH}/{job['id']}")
        ended(client, job)


def refused(client: httpx.Client, **fields: Any) -> Any:
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
def test_what_cannot_be_honoured_is_refused(client: httpx.Client, fields: Any, param: str) -> None:
    before = client.get(PATH, params={"limit": 1}).json()
    assert refused(client, **fields)["param"] == param
    assert client.get(PATH, params={"limit": 1}).json() == before


def test_a_method_that_there_is_not_is_told_which_ones_there_are(client: httpx.Client) -> None:
    for path, methods in ((PATH, "GET, POST"), (f"{PATH}/some-id", "DELETE, GET"), ("/livez", "GET")):
        answer = client.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


@pytest.mark.parametrize("key", ["x" * 256, ""])
def test_an_idempotency_key_has_a_length(client: httpx.Client, key: str) -> None:
    assert client.post(PATH, json=SMALL, headers={"Idempotency-Key": key}).status_code == 400


@pytest.mark.parametrize(
    "job_id", ["none", "../generations", "%00", "x" * 5000, f"{uuid.UUID(int=0, version=4)}"]
)
@pytest.mark.parametrize("path", ["", "/events"])
def test_a_job_that_there_is_not(client: httpx.Client, job_id: str, path: str) -> None:
    answer = client.get(f"{PATH}/{job_id}{path}")
    assert answer.status_code in (404, 405), answer.text
    assert answer.json()["error"]["message"]
