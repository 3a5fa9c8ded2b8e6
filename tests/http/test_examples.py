"""The programs and configurations in `examples/`, run unchanged against a server without Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import yaml

from tests.conftest import needs_jq, needs_node
from tests.http import stages
from tests.http.conftest import ROOT, Endpoint, keys, served
from tests.http.javascript import FOLDER as NODE_FOLDER
from tests.http.relay import Relay
from tests.pictures import opened, picture

EXAMPLES = ROOT / "examples"
STAR = {"star.png": "PNG"}
TWO = {"star-0.png": "PNG", "star-1.png": "PNG"}
STREAM = {"preview-0.png": "PNG", "preview-1.png": "PNG", "triangle.png": "PNG"}
EDIT = {"star.png": "PNG", "circle.png": "PNG", "edited.png": "PNG"}
JPEG = {"star.jpeg": "JPEG"}
LOG = r"began\nimage 0: prior stage\nimage 0: decoder stage\nsucceeded\nstar.jpeg, seed 7\n"
STREAMED = (
    r"image_generation.partial_image: preview-0\.{0}\nimage_generation.partial_image: preview-1\.{0}\n"
    r"image_generation.completed: triangle\.{0}\n"
)
JOB = r"(http\S+/v1/images/jobs/\S+\n)?((queued|running) \d+ ?%\n)+succeeded 100 ?%\nstar.png\n"
PROGRAMS: dict[str, tuple[dict[str, str], str]] = {
    "openai/generate.sh": (STAR, r"star.png, seed 7\n"),
    "openai/generate.py": (TWO, r"star-0.png\nstar-1.png\n"),
    "openai/generate.mjs": (TWO, r"star-0.png, seed 7\nstar-1.png, seed 8\n"),
    "openai/stream.sh": (
        {name.replace("png", "webp"): "WEBP" for name in STREAM},
        STREAMED.format("webp"),
    ),
    "openai/stream.py": (STREAM, STREAMED.format("png")),
    "openai/stream.mjs": (STREAM, STREAMED.format("png")),
    "openai/edit.sh": (EDIT, r"star.png\ncircle.png\nedited.png\n"),
    "openai/edit.py": (EDIT, r"star.png\ncircle.png\nedited.png\n"),
    "openai/edit.mjs": (EDIT, r"star.png\ncircle.png\nedited.png\n"),
    "jobs/job.sh": (STAR, JOB),
    "jobs/job.py": (STAR, JOB),
    "jobs/job.mjs": (STAR, JOB),
    "fal/subscribe.sh": (JPEG, LOG),
    "fal/subscribe.py": (JPEG, LOG),
    "fal/subscribe.mjs": (JPEG, LOG),
    "zai/generate.sh": (STAR, r"star.png\n"),
    "zai/generate.py": (STAR, r"star.png\n"),
    "zai/generate.mjs": (STAR, r"star.png\n"),
    "zai/task.sh": (STAR, r"star.png\n"),
    "zai/task.py": (STAR, r"star.png\n"),
    "zai/task.mjs": (STAR, r"star.png\n"),
    "pixazo/generate.sh": (JPEG, r"star.jpeg, seed 7\n"),
    "pixazo/generate.py": (JPEG, r"star.jpeg, seed 7\n"),
    "pixazo/generate.mjs": (JPEG, r"star.jpeg, seed 7\n"),
}
"""Images that each program writes, by their formats, and the pattern of what it prints."""
TESTED_ELSEWHERE = {
    "webhooks/receiver.py": "test_example_webhooks.py",
    "webhooks/submit.sh": "test_example_webhooks.py",
    "webhooks/fal_receiver.py": "test_example_webhooks.py",
    "webhooks/fal_submit.sh": "test_example_webhooks.py",
    "proxy/nginx.conf": "test_example_proxies.py",
    "proxy/Caddyfile": "test_example_proxies.py",
    "open-webui/open-webui.env": "test_examples.py",
    "litellm/config.yaml": "test_examples.py",
    "README.md": "test_examples.py",
}
"""All other files, and the file with the test of each."""
MARKS = {".sh": (needs_jq,), ".mjs": (needs_node,), ".py": ()}


def marked(files: list[str]) -> list[Any]:
    """Returns programs as parameters of a test that is skipped where their interpreter is missing."""
    return [pytest.param(file, marks=MARKS[Path(file).suffix], id=file) for file in files]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server that wants a key and, like the demo, makes small images by default."""
    defaults = {"steps": 60, "width": 512, "height": 512}
    with served(tmp_path_factory.mktemp("examples"), "glm-image", defaults=defaults, auth=keys()) as server:
        yield server


@pytest.fixture(scope="module")
def star(server: Endpoint) -> bytes:
    """The image that all programs request which save a PNG of one star."""
    prompt = "a small red star above a blue circle on a yellow background"
    body = {"prompt": prompt, "size": "512x512", "seed": 7, "response_format": "b64_json"}
    with server.client(authorization=f"Bearer {server.key}") as client:
        answer = client.post("/v1/images/generations", json=body).json()
    return base64.b64decode(answer["data"][0]["b64_json"])


def start(file: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a folder, with these variables."""
    program = EXAMPLES / file
    if program.suffix == ".mjs":  # Node looks for packages beside the program
        (folder / "node_modules").symlink_to(NODE_FOLDER / "node_modules")
        program = Path(shutil.copy(program, folder))
    interpreter = {".sh": "bash", ".mjs": "node", ".py": sys.executable}[program.suffix]
    kept = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return subprocess.run(
        [interpreter, str(program)],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def variables(file: str, server: Endpoint, key: str) -> dict[str, str]:
    """Returns the environment in which a program uses the server."""
    if file == "fal/subscribe.py":  # those of fal's client
        assert server.certificate
        return {"FAL_RUN_HOST": server.place, "FAL_KEY": key, "HOME": str(server.certificate.parents[4])}
    return {"SERVER": server.url, "KEY": key}


@pytest.fixture
def chosen(request: pytest.FixtureRequest, file: str, tmp_path: Path) -> Endpoint:
    """The server for a program. fal's Python client needs https, and the certificate in its place."""
    if file != "fal/subscribe.py":
        plain: Endpoint = request.getfixturevalue("server")
        return plain
    vendors: Endpoint = request.getfixturevalue("vendors")
    assert vendors.certificate
    place = tmp_path / "home/.local/share/glm-image-server/tls/certificate.pem"
    place.parent.mkdir(parents=True)
    shutil.copy(vendors.certificate, place)
    return Endpoint(vendors.url, vendors.key, vendors.other_key, place)


@pytest.mark.parametrize("file", marked(list(PROGRAMS)))
def test_a_program_writes_its_images(
    file: str, chosen: Endpoint, star: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = PROGRAMS[file]
    if file.startswith("pixazo/"):  # 1.7 s, to be seen in progress by a client that polls every second
        monkeypatch.setattr(stages, "DECODER_SECONDS", 0.8)
    if "/stream" in file:  # 1.6 s, to see when its files are written
        monkeypatch.setattr(stages, "DECODER_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    run = start(file, tmp_path / "run", **variables(file, chosen, chosen.key))
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(output, run.stdout), run.stdout
    assert run.stderr == ""
    written = {
        path.name for path in (tmp_path / "run").glob("*.*") if path.suffix in (".png", ".jpeg", ".webp")
    }
    assert written == images.keys()
    for name, image_format in images.items():
        image = opened((tmp_path / "run" / name).read_bytes())
        assert image.format == image_format
        assert image.size == ((128, 128) if name.startswith("preview") else (512, 512))
    if images in (STAR, TWO):
        assert (tmp_path / "run" / next(iter(images))).read_bytes() == star
    if "/stream" in file:
        first, second, last = ((tmp_path / "run" / name).stat().st_mtime for name in images)
        # The previews are those of a third and of two thirds of the steps.
        assert first + 0.1 < second < last - 0.1, "each file must be written when its event comes"
    if "/edit" in file:
        star, circle, edited = ((tmp_path / "run" / name).read_bytes() for name in images)
        assert edit(chosen, star, circle) == edited, "both sources must be sent, in this order"


def edit(server: Endpoint, *sources: bytes) -> bytes:
    """Requests the edit that the programs request."""
    fields = {"prompt": "make the star green", "response_format": "b64_json", "seed": "1"}
    with server.client(authorization=f"Bearer {server.key}") as client:
        files = [("image[]", source) for source in sources]
        answer = client.post("/v1/images/edits", files=files, data=fields).json()
    return base64.b64decode(answer["data"][0]["b64_json"])


@pytest.mark.parametrize("file", marked(list(PROGRAMS)))
def test_a_program_shows_why_it_is_refused(file: str, chosen: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = start(file, tmp_path / "run", **variables(file, chosen, "wrong"))
    assert run.returncode != 0
    assert re.search("(?i)key", run.stderr), run.stderr
    assert "Traceback" not in run.stderr
    assert not [path for path in (tmp_path / "run").glob("*.*") if path.suffix in (".png", ".jpeg", ".webp")]


@pytest.mark.parametrize("file", marked([file for file in PROGRAMS if file.startswith("jobs/")]))
def test_a_job_is_followed_through_lost_connections(
    file: str, server: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "DECODER_SECONDS", 0.3)  # 4.7 s for a job
    with server.client(authorization=f"Bearer {server.key}") as client:
        before = {job["id"] for job in client.get("/v1/images/jobs?limit=100").json()["data"]}
        relay = Relay(server)
        with relay.relaying():
            run = start(file, tmp_path, SERVER=relay.url, KEY=server.key)
        assert run.returncode == 0, run.stderr
        made = {job["id"] for job in client.get("/v1/images/jobs?limit=100").json()["data"]} - before
    assert len(made) == 1
    first, second = (post.headers["Idempotency-Key"] for post in relay.posts)
    assert first == second
    streams = relay.streams
    assert len(streams) == 3
    seen = [stream.headers.get("Last-Event-ID", "") for stream in streams]
    assert seen == ["", streams[0].sent[-1], streams[1].sent[-1]]
    sent = [event for stream in streams for event in stream.sent]
    assert len(set(sent)) == len(sent) > 2
    assert run.stdout.count("succeeded") == 1
    assert opened((tmp_path / "star.png").read_bytes()).size == (512, 512)


@pytest.mark.parametrize("file", PROGRAMS)
def test_the_defaults_are_those_of_make_serve(file: str) -> None:
    program = (EXAMPLES / file).read_text()
    if file == "fal/subscribe.py":
        assert 'os.environ.setdefault("FAL_RUN_HOST", "127.0.0.1:8000")' in program
        assert 'os.environ.setdefault("FAL_KEY", "none")' in program
        return
    server, key = {
        ".sh": ("SERVER=${SERVER:-http://127.0.0.1:8000}", "KEY=${KEY:-none}"),
        ".py": ('os.environ.get("SERVER", "http://127.0.0.1:8000")', 'os.environ.get("KEY", "none")'),
        ".mjs": ('SERVER = "http://127.0.0.1:8000"', 'KEY = "none" } = process.env'),
    }[Path(file).suffix]
    assert server in program
    assert key in program.replace("'", '"')


def test_every_file_has_a_test_and_a_line_in_the_readme() -> None:
    files = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert files == PROGRAMS.keys() | TESTED_ELSEWHERE.keys()
    for file, test in TESTED_ELSEWHERE.items():
        assert f'"{file}"' in (Path(__file__).parent / test).read_text(), file
    linked = set(re.findall(r"\]\(([\w./-]+)\)", (EXAMPLES / "README.md").read_text()))
    assert {file for file in linked if not file.startswith("..")} == files - {"README.md"}


def test_litellms_requests_are_answered(server: Endpoint) -> None:
    config = yaml.safe_load((EXAMPLES / "litellm/config.yaml").read_text())
    assert config.keys() == {"model_list", "router_settings", "general_settings"}
    (entry,) = config["model_list"]
    assert entry.keys() == {"model_name", "litellm_params", "model_info"}
    assert entry["model_info"] == {"mode": "image_generation"}
    parameters = entry["litellm_params"]
    assert parameters.keys() == {"model", "api_base", "api_key"}
    assert parameters["api_key"] == "os.environ/KEY"
    assert config["general_settings"] == {"master_key": "os.environ/LITELLM_MASTER_KEY"}
    provider, _, model = parameters["model"].partition("/")
    assert provider == "hosted_vllm"
    address = parameters["api_base"].replace("http://127.0.0.1:8000", server.url)
    # LiteLLM sends generations by OpenAI's client, and further fields beside the others.
    with openai.OpenAI(base_url=address, api_key=server.key) as client:
        made = client.images.generate(
            model=model, prompt="a star", n=2, response_format="b64_json", extra_body={"seed": 7}
        )
        # It sends edits itself, and `image[]` even for one image.
        edited = client.images.edit(
            model=model, prompt="make it green", image=[picture()], response_format="b64_json"
        )
        assert [one.id for one in client.models.list()] == [model]
    for image in [*(made.data or []), *(edited.data or [])]:
        assert image.b64_json


OPEN_WEBUI = {
    "ENABLE_IMAGE_GENERATION",
    "IMAGE_GENERATION_ENGINE",
    "IMAGES_OPENAI_API_BASE_URL",
    "IMAGES_OPENAI_API_KEY",
    "IMAGE_GENERATION_MODEL",
    "IMAGE_SIZE",
    "IMAGES_OPENAI_PARAMS",
    "ENABLE_IMAGE_PROMPT_GENERATION",
    "ENABLE_IMAGE_EDIT",
    "IMAGE_EDIT_ENGINE",
    "IMAGES_EDIT_OPENAI_API_BASE_URL",
    "IMAGES_EDIT_OPENAI_API_KEY",
    "IMAGE_EDIT_MODEL",
}
"""Variables that `open_webui/config.py` of Open WebUI 0.12.4 reads."""


def test_open_webuis_requests_are_answered(server: Endpoint) -> None:
    lines = (EXAMPLES / "open-webui/open-webui.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings.keys() == OPEN_WEBUI
    assert settings["ENABLE_IMAGE_GENERATION"] == settings["ENABLE_IMAGE_EDIT"] == "true"
    assert settings["IMAGE_GENERATION_ENGINE"] == settings["IMAGE_EDIT_ENGINE"] == "openai"
    assert settings["IMAGES_OPENAI_API_KEY"] == settings["IMAGES_EDIT_OPENAI_API_KEY"] == "none"

    async def replay() -> list[Any]:
        """Sends what Open WebUI sends, as it sends it."""
        headers = {"Authorization": f"Bearer {server.key}"}
        async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as client:

            async def post(base: str, route: str, **body: Any) -> Any:
                url = f"{settings[base].replace('http://127.0.0.1:8000', server.url)}/images/{route}"
                async with client.post(url, **body) as answer:
                    return await answer.json()

            body = {
                "model": settings["IMAGE_GENERATION_MODEL"],
                "prompt": "a star",
                "n": 1,
                "size": settings["IMAGE_SIZE"],
                "response_format": "b64_json",
                **json.loads(settings["IMAGES_OPENAI_PARAMS"]),
            }
            made = [await post("IMAGES_OPENAI_API_BASE_URL", "generations", json=body)]
            for fields in (["image"], ["image[]", "image[]"]):
                form = aiohttp.FormData()
                form.add_field("model", settings["IMAGE_EDIT_MODEL"])
                form.add_field("prompt", "make it green")
                form.add_field("response_format", "b64_json")
                for name in fields:
                    form.add_field(name, picture(), filename="a.png", content_type="image/png")
                made.append(await post("IMAGES_EDIT_OPENAI_API_BASE_URL", "edits", data=form))
            return made

    images = [opened(base64.b64decode(answer["data"][0]["b64_json"])) for answer in asyncio.run(replay())]
    assert [image.size for image in images] == [(512, 512)] * 3
    assert images[0].format == "WEBP"
