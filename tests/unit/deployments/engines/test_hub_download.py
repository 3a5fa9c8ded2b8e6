"""Downloads from the Hub: only a stage's own files, resumed after a cut, named in errors, logged.

The real `huggingface_hub` downloads over real sockets. Only the Hub is fake: a small one on 127.0.0.1 that
has the tiny checkpoint. It does not support Xet, so files come over plain HTTP.
"""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants, try_to_load_from_cache

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.engines.checkpoint import _LoggedProgress
from deployments.errors import CheckpointError
from deployments.families.glm_image import tiny
from deployments.families.glm_image.checkpoint import load_decoder, load_prior

REPO = "org/glm-image"
COMMIT = "a" * 40
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
UNWANTED = {
    "README.md",
    "pipeline.py",
    "processor/processing.py",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/modeling.py",
    "vision_language_encoder/pytorch_model.bin",
}


class Hub(ThreadingHTTPServer):
    """A Hub with one commit of one repository: the tiny checkpoint, and files that no stage should request.

    Attributes:
        files: content of each file.
        requested: files whose metadata or content was requested.
        resumed: first byte of the last request for each file that was resumed.
        cut_once: file whose next download breaks off half way.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        folder = tiny.cached()
        checkpoint = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in checkpoint}
        self.files |= dict.fromkeys(UNWANTED, b"unwanted")
        self.requested: set[str] = set()
        self.resumed: dict[str, int] = {}
        self.cut_once: str | None = None


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of `snapshot_download`: the list of files, their metadata and their content."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            files = self.server.files.items()
            entries = [{"type": "file", "path": k, "size": len(v), "oid": digest(v)} for k, v in files]
            self.answer(200, {}, json.dumps(entries).encode())
        elif name in self.server.files:
            self.answer_file(name, self.server.files[name])
        else:
            self.answer(404, {"X-Error-Code": "RevisionNotFound" if REPO in path else "RepoNotFound"})

    def answer_file(self, name: str, content: bytes) -> None:
        self.server.requested.add(name)
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = self.server.resumed[name] = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, headers, content[start:])
        elif self.command == "GET" and name == self.server.cut_once:
            self.server.cut_once = None
            self.answer(200, headers | {"Content-Length": str(len(content))}, content[: len(content) // 2])
        else:
            self.answer(200, headers, content)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the requests out of the tests' output."""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        url = f"http://127.0.0.1:{hub.server_port}"
        # Their environment variables are read once, when `huggingface_hub` is imported.
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)  # do not use the user's token
        monkeypatch.setenv("no_proxy", "*")
        close_session()  # an open session may use a proxy
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        close_session()
        hub.shutdown()
        thread.join()


def model(checkpoint: str = REPO, revision: str = COMMIT) -> ModelConfig:
    prior = PriorConfig(device="cpu", dtype="float32")
    decoder = DecoderConfig(device="cpu", dtype="float32")
    return ModelConfig(
        name="m", family="glm_image", checkpoint=checkpoint, revision=revision, prior=prior, decoder=decoder
    )


@pytest.mark.parametrize(
    ("load", "own"),
    [
        (load_decoder, {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}),
        (load_prior, {"vision_language_encoder", "processor"}),
    ],
)
def test_a_stage_downloads_its_own_components(
    hub: Hub, load: Callable[[ModelConfig], object], own: set[str]
) -> None:
    load(model())
    assert {name.partition("/")[0] for name in hub.requested} == {"model_index.json", *own}
    assert not hub.requested & UNWANTED


def test_a_download_that_was_cut_resumes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only whole chunks survive a cut, and by default they are larger than any of these files.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    hub.cut_once = TRANSFORMER
    load_decoder(model())
    assert 0 < hub.resumed[TRANSFORMER] < len(hub.files[TRANSFORMER])
    path = try_to_load_from_cache(REPO, TRANSFORMER, revision=COMMIT)
    assert Path(path).read_bytes() == hub.files[TRANSFORMER]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("checkpoint", "revision"), [(REPO, "b" * 40), ("org/unknown", COMMIT)])
def test_a_checkpoint_that_the_hub_lacks_is_named(checkpoint: str, revision: str) -> None:
    # The library's message has both too, but only as parts of a URL.
    with pytest.raises(CheckpointError, match=rf"'{checkpoint}'.* {revision}\b"):
        load_decoder(model(checkpoint, revision))


def test_progress_is_logged(
    hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once Ray Serve is imported by another test, its loggers do not propagate.
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "ray.serve")
    monkeypatch.setattr(_LoggedProgress, "logged_at", float("-inf"))  # as if the last line was long ago
    load_decoder(model())
    assert re.search(r"downloading: \d+ of at least \d+ MB", caplog.text)
