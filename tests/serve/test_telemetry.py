"""Logs and traces of a run that exercises every route. They contain no prompt, image or key."""

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
from tests.polling import until
from tests.receiver import Receiver
from tests.serve.conftest import ROOT, Running, config_file, served, tiny_model
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
    """A server after the run, with its responses and telemetry.

    Attributes:
        folder: folder of its files and jobs.
        answers: responses to the run's requests.
        secrets: parts of the run's images, in each form in which a log could contain them.
        metrics: metrics scraped at the end of the run.
    """

    running: Running
    folder: Path
    collector: Collector
    answers: list[httpx.Response]
    secrets: list[bytes]
    metrics: str

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Returns the log lines of an event type from all processes."""
        files = self.running.logs().glob("serve/replica_*.log")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("event") == event]


def until_done(http: httpx.Client, answer: httpx.Response, url: str, done: str) -> Iterator[httpx.Response]:
    """Yields the response, then polls the URL and yields the final response."""
    yield answer
    until(lambda: f'"{done}"' in http.get(url).text, 120)
    yield http.get(url)


def post(http: httpx.Client, path: str, body: Any, **headers: str) -> httpx.Response:
    return http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def images_by_every_route(http: httpx.Client, receiver: Receiver, sent: bytes) -> Iterator[httpx.Response]:
    """Sends requests to every route, and yields the responses."""
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
    probes = ("/health", "/version", "/livez", "/readyz", "/v1/internal/status")
    for path in ("/v1/models", "/v1/models/m", *probes):
        yield http.get(path)
    yield http.get("/.well-known/jwks.json")

    hook = {"webhook_url": f"{receiver.url}/hook"}
    body = BODY | hook | {"images": [{"image_url": data_url}], "partial_images": 1}
    job = post(http, "/v1/images/jobs", body, x_request_id="submitted")
    yield from until_done(http, job, job.headers["location"], "delivered")
    yield http.get(job.headers["location"] + "/events")
    yield http.delete(job.headers["location"])
    operators = f"/v1/internal/operator/jobs/{job.json()['id']}"
    yield http.patch(operators, json={"priority": "low"})
    yield http.delete(operators)
    yield http.get("/v1/images/jobs")
    yield http.post(job.headers["location"] + "/purge")

    yield from images_by_hosted_apis(http, sent, data_url)
    yield http.get("/v1/internal/operator")
    yield http.get("/v1/internal/operator/usage.csv")
    yield http.get("/v1/internal/unload?model=m")
    yield http.post("/v1/internal/unload")


def images_by_hosted_apis(http: httpx.Client, sent: bytes, data_url: str) -> Iterator[httpx.Response]:
    for kind, fields in (("", {}), ("/image-to-image", {"image_urls": [data_url]})):
        yield post(http, f"/fal-ai/m{kind}", HOSTED | fields)
        queued = post(http, f"/queue/fal-ai/m{kind}", HOSTED | fields)
        yield from until_done(http, queued, queued.json()["status_url"], "COMPLETED")
    yield http.get(queued.json()["response_url"])
    yield http.get(queued.json()["status_url"] + "/stream")
    yield http.put(queued.json()["cancel_url"])
    upload = post(http, "/storage/upload/initiate", {"content_type": "image/png", "file_name": "a.png"})
    yield upload
    yield http.put(upload.json()["upload_url"], content=sent, headers={"Content-Type": "image/png"})

    zai = BODY | {"model": "m"}
    yield post(http, "/api/paas/v4/images/generations", zai)
    task = post(http, "/api/paas/v4/async/images/generations", zai)
    yield from until_done(http, task, f"/api/paas/v4/async-result/{task.json()['id']}", "SUCCESS")

    for kind, fields in (("glm-image", {}), (EDIT, {"image_urls": [data_url]})):
        path = f"/{kind}/v1/{kind}-request"
        submitted = post(http, path, HOSTED | fields)
        body = {"request_id": submitted.json()["request_id"]}
        yield from until_done(http, submitted, f"{path}-result?request_id={body['request_id']}", "COMPLETED")
        yield post(http, f"{path}-result", body)
    yield post(http, f"/v2/requests/status/{body['request_id']}", body)
    yield http.get(f"/v2/requests/status/{body['request_id']}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, receiver, collector = tmp_path_factory.mktemp("watched"), Receiver(), Collector()
    args = yaml.safe_load((ROOT / "configs/tiny-helpers.yaml").read_text())["applications"][0]["args"]
    args["safety_checker"]["threshold"] = 1  # random weights never reach it
    args["prompt_expander"]["timeout_s"] = 120  # it is still loading at the first request
    args["models"] = [tiny_model("m"), tiny_model("broken", checkpoint=str(folder / "nowhere"))]
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    args["auth"] = {"api_keys": [{"id": "somebody", "sha256": digest, "role": "operator"}]}
    args["outbound"] = {"allow": [receiver.place]}
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        receiver.receiving(),
        collector.receiving(),
        served(
            config_file(folder, args.pop("models"), **args),
            RAY_metrics_report_interval_ms="1000",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
            OTEL_BSP_SCHEDULE_DELAY="200",
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
    expected = {(method.upper(), path) for path in paths for method in paths[path] if path not in PROBES}
    assert {(line["method"], line["route"]) for line in watched.lines("request")} >= expected
    assert len(expected) > 30
    statuses = Counter(answer.status_code for answer in watched.answers)
    assert statuses.keys() == {200, 202, 400, 401, 409, 500}
    assert statuses[200] > 30


def test_logs_traces_metrics_and_errors_contain_no_prompt_image_or_key(watched: Watched) -> None:
    logs = [file for file in watched.running.logs().rglob("*") if file.is_file()]
    refused = [answer for answer in watched.answers if answer.status_code >= 400]
    outputs = {
        **{str(file): file.read_bytes() for file in logs},
        "the terminal": "".join(watched.running.log).encode(),
        "traces": b"".join(watched.collector.bodies),
        "metrics": watched.metrics.encode(),
        "errors": b"".join(answer.content for answer in refused),
    }
    assert len(outputs) > 10
    assert min(map(len, (outputs["traces"], outputs["metrics"], outputs["errors"]))) > 500
    for where, written in outputs.items():
        for secret in (PROMPT[-13:].encode(), KEY.encode(), *watched.secrets):
            found = re.search(b".{,80}" + re.escape(secret) + b".{,80}", written)
            assert not found, (where, found[0])


def test_only_jobs_store_prompts_and_only_files_store_images(watched: Watched) -> None:
    stored = {file: file.read_bytes() for file in watched.folder.rglob("*") if file.is_file()}
    jobs = b"".join(data for file, data in stored.items() if file.name.startswith("jobs.db"))
    assert PROMPT.encode() in jobs
    assert not any(secret in jobs for secret in watched.secrets)
    files = [data for file, data in stored.items() if file.parent.name == "files"]
    assert not any(PROMPT.encode() in data for data in files)
    assert any(watched.secrets[4] in data for data in files), "a file must contain the generated image"
    assert not any(KEY.encode() in data for data in stored.values())


def wait_for_trace(watched: Watched, trace_id: str, spans: int) -> list[Span]:
    """Waits until a trace has this many spans, and returns them."""
    until(lambda: len(watched.collector.trace(trace_id)) >= spans)
    return watched.collector.trace(trace_id)


def tree(spans: list[Span], root: str) -> dict[str, Any]:
    """Returns the names of the spans below a span, as nested dictionaries. Repeated names are numbered."""
    below: dict[str, Any] = {}
    for span in sorted(spans, key=lambda span: span.began):
        if span.parent_id == root:
            repeats = sum(name.split("#")[0] == span.name for name in below)
            below[f"{span.name}#{repeats}" if repeats else span.name] = tree(spans, span.span_id)
    return below


IMAGE: dict[str, Any] = {
    "prior": {"waiting": {}, "prior": {}},
    "decoder": {"waiting": {}, "decoder": {}},
    "safety": {"safety": {}},
}


def test_a_request_has_one_trace_across_all_processes(watched: Watched) -> None:
    spans = wait_for_trace(watched, TRACE, 25)
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
    assert len(set(processes.values())) == 5, "expected the ingress, both stages and both helpers"


def test_a_job_belongs_to_the_trace_of_its_submission(watched: Watched) -> None:
    (line,) = [line for line in watched.lines("request") if line.get("request_id") == "submitted"]
    spans = wait_for_trace(watched, line["trace_id"], 10)
    (root,) = tree(spans, "").values()
    assert root.keys() >= {"job"}
    assert root["job"].keys() >= {"image", "encoding", "storing"}
    (job,) = [span for span in spans if span.name == "job"]
    assert job.attributes["job"] == line["job"]
    (ended,) = [end for end in watched.lines("job") if end["job"] == line["job"]]
    assert (ended["outcome"], ended["trace_id"]) == ("succeeded", line["trace_id"])


def test_spans_record_failures(watched: Watched) -> None:
    (line,) = [line for line in watched.lines("request") if line.get("request_id") == "broken"]
    spans = wait_for_trace(watched, line["trace_id"], 3)
    (root,) = [span for span in spans if not span.parent_id]
    assert root.failed
    assert root.attributes["error.type"] == "model_loading_failed"
    assert all(span.failed for span in spans if span.name in ("image", "prior"))


def test_the_request_id_is_logged_by_every_deployment(watched: Watched) -> None:
    lines = [line for line in watched.lines("unit") if line["request_id"] == "traced"]
    counts = Counter(line["deployment"].partition("_")[2] for line in lines)
    assert counts == {"m-prior": 2, "m-decoder": 2, "safety-checker": 2, "prompt-expander": 1}
    assert {line["outcome"] for line in lines} == {"made"}
    priors = [line for line in lines if line["deployment"].endswith("m-prior")]
    assert all(0 < line["passes"] <= line["tokens"] for line in priors)
    jobs = {line["job"] for line in watched.lines("job")}
    units = watched.lines("unit")
    assert jobs
    assert jobs <= {line["request_id"] for line in units if line["deployment"].endswith("m-decoder")}


def test_loads_unloads_and_load_failures_are_logged(watched: Watched) -> None:
    loads = watched.lines("load")
    loaded = {line["deployment"] for line in loads if line["outcome"] == "loaded"}
    assert {name.partition("_")[2] for name in loaded} == {
        "m-prior", "m-decoder", "safety-checker", "prompt-expander",
    }  # fmt: skip
    assert all(line["seconds"] > 0 for line in loads if line["outcome"] == "loaded")
    failed = [line for line in loads if line["outcome"] == "failed"]
    assert {line["levelname"] for line in failed} == {"ERROR"}
    assert all("nowhere" in line["reason"] for line in failed)
    until(lambda: loaded <= {line["deployment"] for line in watched.lines("unload")})


def test_log_levels_follow_the_outcome(watched: Watched) -> None:
    levels = {(line["outcome"], line["levelname"]) for line in watched.lines("request")}
    assert levels == {("succeeded", "INFO"), ("refused", "INFO"), ("failed", "ERROR")}
    failing = [line for line in watched.lines("unit") if line["levelname"] != "INFO"]
    assert {line["outcome"] for line in failing} == {"LoadingFailed"}
