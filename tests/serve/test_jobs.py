"""Jobs on real stages: their pixels, their progress, and cancelling."""

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np

from tests.job_client import PATH, SMALL, ended, events, pixels, submit
from tests.polling import until
from tests.serve.conftest import Server, Upstream


def test_a_job_returns_the_images_of_the_same_synchronous_request(
    client: httpx.Client, server: Server, upstream: Callable[[Path], Upstream]
) -> None:
    answer = client.post(PATH, json=SMALL | {"seed": 41, "n": 2})
    assert answer.status_code == 202
    job = answer.json()
    assert (job["object"], job["seed"], job["n"], job["size"]) == ("image.job", 41, 2, "512x512")
    assert answer.headers["location"] == f"{server.url}{PATH}/{job['id']}"
    done = ended(client, job)
    assert (done["status"], done["progress"]) == ("succeeded", 1)
    reference = upstream(server.checkpoints["glm-image"])
    for i, image in enumerate(done["result"]["data"]):
        assert image["seed"] == 41 + i
        made = pixels(client.get(image["url"]).content)
        assert np.array_equal(made, reference("a boat", 512, 512, seed=41 + i))
    assert done == client.get(answer.headers["location"]).json()
    direct = client.post("/v1/images/generations", json=SMALL | {"seed": 41, "n": 2}).json()
    assert direct.keys() == done["result"].keys()
    assert direct["usage"] == done["result"]["usage"]


def test_events_report_progress_and_can_be_resumed(
    client: httpx.Client,
) -> None:
    # Large enough to be seen in the prior stage, and enough steps for two previews.
    job = submit(client, size="1024x1024", num_inference_steps=20, partial_images=2)
    received = []
    previews = set()
    for event in events(client, job):
        received.append(event)
        for preview in event["data"].get("previews", ()):
            if preview["index"] not in previews:
                assert pixels(client.get(preview["url"]).content).size
                previews.add(preview["index"])
    assert previews == {0, 1}
    assert [event["event"] for event in received] == [event["data"]["status"] for event in received]
    seen = [stage["stage"] for event in received for stage in event["data"].get("images", ())]
    assert set(seen) >= {"prior", "decoder"}
    progress = [event["data"]["progress"] for event in received]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    ids = [event["id"] for event in received]
    assert len(set(ids)) == len(ids)
    assert [event["event"] for event in events(client, job, ids[1])] == ["succeeded"]
    assert list(events(client, job, ids[-1])) == []
    assert all(
        client.get(p["url"]).status_code == 404 for e in received for p in e["data"].get("previews", ())
    )


def test_a_running_job_can_be_cancelled(client: httpx.Client) -> None:
    job = submit(client, num_inference_steps=100, size="1024x1024")
    for event in events(client, job):
        if event["event"] == "running" and event["data"]["progress"]:
            answer = client.delete(f"{PATH}/{job['id']}")
            assert answer.status_code == 200
    assert event["event"] == "cancelled"
    until(lambda: client.get("/v1/internal/status").json()["units"] == [])
    assert client.delete(f"{PATH}/{job['id']}").json()["status"] == "cancelled"
    assert "result" not in client.get(f"{PATH}/{job['id']}").json()
