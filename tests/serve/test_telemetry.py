"""Logs and traces of a run that exercises every route: what they say, and what is in none of them."""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from serve_app.observability.telemetry import PROBES
from tests.receiver import Receiver
from tests.serve.conftest import ROOT, Running, config_file, served, tiny_model, until
from tests.spans import Collector, Span

pytestmark = pytest.mark.slow
PROMPT = "a boat, canary-41d2e8"
KEY = "canary-key-9a0b77"
TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY: dict[str, Any] = {"prompt": PROMPT, "size": "512x512", "num_inference_steps": 2, "seed": 1}
HOSTED: dict[str, Any] = {"prompt": PROMPT, "image_size": "square", "num_inference_steps": 10, "seed": 1}
EDIT = "glm-image-image-to-image"


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Watched:
    """A server, all that it answered to a run, and what watches it.

    Attributes:
        folder: of its files and jobs.
        picture: the source image of the run's edits.
        secrets: of the run's images, a part of each in the forms in which it could turn up.
        metrics: what was scraped at the run's end.
    """

    running: Running
    folder: Path
    collector: Collector
    answers: list[httpx.Response]
    secrets: list[bytes]
    metrics: str

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of a kind, of all processes."""
        files = self.running.logs().glob("serve/replica_*.log")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("event") == event]


def later(http: httpx.Client, answer: httpx.Response, url: str, done: str) -> Iterator[httpx.Response]:
    """The answer, and the one when what it is about has ended."""
    yield answer
    until(lambda: f'"{done}"' in http.get(url).text, 120)
    yield http.get(url)


def post(http: httpx.Client, path: str, body: Any, **headers: str) -> httpx.Response:
    return http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def images_by_every_route(http: httpx.Client, receiver: Receiver, sent: bytes) -> Iterator[httpx.Response]:
    """Ask for all that there is to be asked for, once at least; yields the answers."""
    data_url = f"data:image/png;base64,{base64.b64encode(sent).decode()}"

    traced = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01", "x_request_id": "traced"}
    made = post(http, "/v1/images/generations", BODY | {"n": 2, "enable_prompt_expansion": True}, **traced)
    yield made
    yield http.get(made.json()["data"][0]["url"])
    yield post(http, "/v1/images/generations", BODY | {"stream": True, "partial_images": 1})
    yield post(http, "/v1/images/generations", BODY | {"response_format": "b64_json"})
    yield post(http, "/v1/images/generations", BODY | {"model": "broken"}, x_request_id="broken")
    yield post(http, "/v1/images/generations", BODY | {"size": "7x7"})
    yield post(http, "/v1/images/generations", BODY | {"caption": PROMPT})
    yield post(http, "/v1/images/generations", BODY, authorization=f"Bearer {KEY}x")
    yield http.post("/v1/images/generations", content=f'{{"prompt": "{PROMPT}')
    form = {"prompt": PROMPT, "size": "512x512", "num_inference_steps": "2"}
    yield http.post("/v1/images/edits", data=form, files={"image": ("a.png", sent)})
    yield http.post("/v1/images/edits", data=form, files={"image": ("a.png", sent[:1000])})
    for path in ("/v1/models", "/v1/models/m", "/health", "/livez", "/readyz", "/v1/internal/status"):
        yield http.get(path)
    yield http.get("/.well-known/jwks.json")

    hook = {"webhook_url": f"{receiver.url}/hook"}
    body = BODY | hook | {"images": [{"image_url": data_url}], "partial_images": 1}
    job = post(http, "/v1/images/jobs", body, x_request_id="submitted")
    yield from later(http, job, job.headers["location"], "delivered")
    yield http.get(job.headers["location"] + "/events")
    yield http.delete(job.headers["location"])
    yield http.get("/v1/images/jobs")
    yield http.post(job.headers["location"] + "/purge")

    yield from images_by_hosted_apis(http, sent, data_url)
    yield http.get("/v1/internal/unload?model=m")
    yield http.post("/v1/internal/unload")


def images_by_hosted_apis(http: httpx.Client, sent: bytes, data_url: str) -> Iterator[httpx.Response]:
    for kind, fields in (("", {}), ("/image-to-image", {"image_urls": [data_url]})):
        yield post(http, f"/fal-ai/m{kind}", HOSTED | fields)
        queued = post(http, f"/queue/fal-ai/m{kind}", HOSTED | fields)
        yield from later(http, queued, queued.json()["status_url"], "COMPLETED")
    yield http.get(queued.json()["response_url"])
    yield http.get(queued.json()["status_url"] + "/stream")
    yield http.put(queued.json()["cancel_url"])
    upload = post(http, "/storage/upload/initiate", {"content_type": "image/png", "file_name": "a.png"})
    yield upload
    yield http.put(upload.json()["upload_url"], content=sent, headers={"Content-Type": "image/png"})

    zai = BODY | {"model": "m"}
    yield post(http, "/api/paas/v4/images/generations", zai)
    task = post(http, "/api/paas/v4/async/images/generations", zai)
    yield from later(http, task, f"/api/paas/v4/async-result/{task.json()['id']}", "SUCCESS")

    for kind, fields in (("glm-image", {}), (EDIT, {"image_urls": [data_url]})):
        path = f"/{kind}/v1/{kind}-request"
        asked = post(http, path, HOSTED | fields)
        named = {"request_id": asked.json()["request_id"]}
        yield from later(http, asked, f"{path}-result?request_id={named['request_id']}", "COMPLETED")
        yield post(http, f"{path}-result", named)
    yield post(http, f"/v2/requests/status/{named['request_id']}", named)
    yield http.get(f"/v2/requests/status/{named['request_id']}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, receiver, collector = tmp_path_factory.mktemp("watched"), Receiver(), Collector()
    args = yaml.safe_load((ROOT / "configs/tiny-helpers.yaml").read_text())["applications"][0]["args"]
    args["safety_checker"]["threshold"] = 1  # which chance does not reach
    args["prompt_expander"]["timeout_s"] = 120  # it is loading when it is asked
    args["models"] = [tiny_model("m"), tiny_model("broken", checkpoint=str(folder / "nowhere"))]
    args["auth"] = {"api_keys": [{"id": "somebody", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}
    args["outbound"] = {"allow": [receiver.place]}
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        receiver.receiving(),
        collector.receiving(),
        served(
            config_file(folder, args.pop("models"), **args),
            RAY_metrics_report_interval_ms="1000",
            **environment,
        ) as running,
        httpx.Client(base_url=running.url, headers=headers, timeout=180) as http,
    ):
        until(lambda: any(line.startswith("Metrics for") for line in running.log))
        (endpoint,) = [line.split()[-1] for line in running.log if line.startswith("Metrics for")]
        sent = picture()
        answers = list(images_by_every_route(http, receiver, sent))
        until(lambda: 'route="/v1/internal/unload"' in httpx.get(endpoint, timeout=30).text)
        made = base64.b64decode(answers[3].json()["data"][0]["b64_json"])
        secrets = [
            form
            for image in (sent, made)
            for form in (base64.b64encode(image)[100:150], image[60:90], repr(image[60:80])[2:-1].encode())
        ]
        yield Watched(running, folder, collector, answers, secrets, httpx.get(endpoint, timeout=30).text)


def test_the_run_exercises_every_route(watched: Watched) -> None:
    paths = httpx.get(f"{watched.running.url}/openapi.json").json()["paths"]
    there = {(method.upper(), path) for path in paths for method in paths[path] if path not in PROBES}
    assert {(line["method"], line["route"]) for line in watched.lines("request")} >= there
    assert len(there) > 30
    statuses = Counter(answer.status_code for answer in watched.answers)
    assert statuses.keys() == {200, 202, 400, 401, 409, 500}
    assert statuses[200] > 30


def test_no_log_trace_metric_or_error_holds_a_prompt_an_image_or_a_key(watched: Watched) -> None:
    logs = [file for file in watched.running.logs().rglob("*") if file.is_file()]
    refused = [answer for answer in watched.answers if answer.status_code >= 400]
    told = {
        **{str(file): file.read_bytes() for file in logs},
        "the terminal": "".join(watched.running.log).encode(),
        "traces": b"".join(watched.collector.bodies),
        "metrics": watched.metrics.encode(),
        "errors": b"".join(answer.content for answer in refused),
    }
    assert len(told) > 10
    assert min(map(len, (told["traces"], told["metrics"], told["errors"]))) > 500
    for where, written in told.items():
        for secret in (PROMPT[-13:].encode(), KEY.encode(), *watched.secrets):
            found = re.search(b".{,80}" + re.escape(secret) + b".{,80}", written)
            assert not found, (where, found[0])


def test_prompts_are_kept_in_jobs_images_in_files_and_keys_nowhere(watched: Watched) -> None:
    kept = {file: file.read_bytes() for file in watched.folder.rglob("*") if file.is_file()}
    jobs = b"".join(data for file, data in kept.items() if file.name.startswith("jobs.db"))
    assert PROMPT.encode() in jobs
    assert not any(secret in jobs for secret in watched.secrets)
    files = [data for file, data in kept.items() if file.parent.name == "files"]
    assert not any(PROMPT.encode() in data for data in files)
    assert any(watched.secrets[4] in data for data in files), "the image that was made"
    assert not any(KEY.encode() in data for data in kept.values())


def of_trace(watched: Watched, trace_id: str, spans: int) -> list[Span]:
    """A trace, when all its spans have come."""
    until(lambda: len(watched.collector.trace(trace_id)) >= spans)
    return watched.collector.trace(trace_id)


def tree(spans: list[Span], root: str) -> dict[str, Any]:
    """The names of all that is below a span, as nested dictionaries; equal ones are numbered."""
    below: dict[str, Any] = {}
    for span in sorted(spans, key=lambda span: span.began):
        if span.parent_id == root:
            alike = sum(name.split("#")[0] == span.name for name in below)
            below[f"{span.name}#{alike}" if alike else span.name] = tree(spans, span.span_id)
    return below


IMAGE: dict[str, Any] = {
    "prior": {"waiting": {}, "prior": {}},
    "decoder": {"waiting": {}, "decoder": {}},
    "safety": {"safety": {}},
}


def test_the_spans_of_a_request_are_one_tree_over_all_processes(watched: Watched) -> None:
    spans = of_trace(watched, TRACE, 25)
    ((name, below),) = tree(spans, CLIENT_SPAN).items()
    assert name == "POST /v1/images/generations"
    assert below == {
        "expansion": {"expansion": {}},
        "image": IMAGE,
        "image#1": IMAGE,
        **{part: {} for part in ("encoding", "encoding#1", "storing", "storing#1")},
    }
    by_id = {span.span_id: span for span in spans}
    (root,) = [span for span in spans if span.parent_id == CLIENT_SPAN]
    assert root.kind == "server"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["request_id"] == "traced"
    assert root.attributes["model"] == "m"
    for span in spans:
        assert span.service == "glm-image-server"
        parent = by_id.get(span.parent_id, root)
        assert parent.began - 50e6 <= span.began <= span.ended <= parent.ended + 50e6
        if span.name in ("prior", "decoder", "safety", "expansion") and span.kind == "server":
            assert span.process != root.process
        else:
            assert span.process == root.process
    processes = {span.name: span.process for span in spans if span.kind == "server"}
    assert len(set(processes.values())) == 5, "the ingress, both stages, both helpers"


def test_a_job_belongs_to_the_trace_of_its_submission(watched: Watched) -> None:
    (line,) = [line for line in watched.lines("request") if line.get("request_id") == "submitted"]
    spans = of_trace(watched, line["trace_id"], 10)
    (root,) = tree(spans, "").values()
    assert root.keys() >= {"job"}
    assert root["job"].keys() >= {"image", "encoding", "storing"}
    (job,) = [span for span in spans if span.name == "job"]
    assert job.attributes["job"] == line["job"]
    (ended,) = [end for end in watched.lines("job") if end["job"] == line["job"]]
    assert (ended["outcome"], ended["trace_id"]) == ("succeeded", line["trace_id"])


def test_a_span_says_what_failed(watched: Watched) -> None:
    (line,) = [line for line in watched.lines("request") if line.get("request_id") == "broken"]
    spans = of_trace(watched, line["trace_id"], 3)
    (root,) = [span for span in spans if not span.parent_id]
    assert root.failed
    assert root.attributes["error.type"] == "model_loading_failed"
    assert all(span.failed for span in spans if span.name in ("image", "prior"))


def test_a_requests_id_is_in_the_lines_of_all_that_worked_for_it(watched: Watched) -> None:
    lines = [line for line in watched.lines("unit") if line["request_id"] == "traced"]
    by = Counter(line["deployment"].removeprefix("glm-image_") for line in lines)
    assert by == {"m-prior": 2, "m-decoder": 2, "safety-checker": 2, "prompt-expander": 1}
    assert {line["outcome"] for line in lines} == {"made"}
    jobs = {line["job"] for line in watched.lines("job")}
    units = watched.lines("unit")
    assert jobs
    assert jobs <= {line["request_id"] for line in units if line["deployment"].endswith("m-decoder")}


def test_loads_unloads_and_faults_have_a_line_each(watched: Watched) -> None:
    loads = watched.lines("load")
    loaded = {line["deployment"] for line in loads if line["outcome"] == "loaded"}
    assert {name.removeprefix("glm-image_") for name in loaded} == {
        "m-prior", "m-decoder", "safety-checker", "prompt-expander",
    }  # fmt: skip
    assert all(line["seconds"] > 0 for line in loads if line["outcome"] == "loaded")
    failed = [line for line in loads if line["outcome"] == "failed"]
    assert {line["levelname"] for line in failed} == {"ERROR"}
    assert all("nowhere" in line["reason"] for line in failed)
    until(lambda: loaded <= {line["deployment"] for line in watched.lines("unload")})


def test_levels_tell_what_somebody_should_look_at(watched: Watched) -> None:
    levels = {(line["outcome"], line["levelname"]) for line in watched.lines("request")}
    assert levels == {("succeeded", "INFO"), ("refused", "INFO"), ("failed", "ERROR")}
    failing = [line for line in watched.lines("unit") if line["levelname"] != "INFO"]
    assert {line["outcome"] for line in failing} == {"LoadingFailed"}
