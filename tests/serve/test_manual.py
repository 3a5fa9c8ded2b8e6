"""The examples of the README and the manual, run unchanged except for the server's address and key."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.families.glm_image import tiny
from tests.conftest import needs_node
from tests.http.conftest import KEY, OTHER_KEY, Endpoint, keys
from tests.serve.conftest import ROOT, SMALL_SIZES, Server, config_file, served, tiny_model

ADDRESS = "http://127.0.0.1:8000"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def curls() -> Iterator[Any]:
    """Yields the curl commands of all pages."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for block in [*blocks(name, "bash"), *blocks(name, "sh")]:
            if block.startswith("curl"):
                yield pytest.param(block, id=f"{name}:{block.split()[-1][:20]}")


@pytest.mark.parametrize("command", list(curls()))
def test_a_curl_command_gets_an_answer(server: Server, command: str) -> None:
    assert ADDRESS in command
    run = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url).replace("curl", "curl --fail-with-body", 1)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(run.stdout.rpartition("\n\n")[2])  # after the headers, if they are shown
    if "/unload" in command:  # later tests expect loaded models
        for model in httpx.get(f"{server.url}/v1/models").json()["data"]:
            body = {"prompt": "A red boat", "model": model["id"], "size": "512x512", "num_inference_steps": 2}
            answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=120)
            assert answer.status_code == 200, answer.text


def test_the_quickstart_shows_the_answer_to_its_first_command(server: Server) -> None:
    (command,) = (block for block in blocks("docs/quickstart.md", "sh") if block.startswith("curl"))
    assert command in blocks("README.md", "bash")
    run = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)], check=True, capture_output=True
    )
    answer = json.loads(run.stdout)
    (shown,) = map(json.loads, blocks("docs/quickstart.md", "json"))
    assert answer.keys() == shown.keys()
    assert answer["data"][0].keys() == shown["data"][0].keys()
    assert answer["data"][0]["seed"] == shown["data"][0]["seed"]
    assert answer["size"] == shown["size"]


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("README.md", ["circle.png"]),
        ("docs/quickstart.md", ["circle.png"]),
        ("docs/guides/openai.md", ["star.png", "circle.png", "green.png"]),
    ],
)
def test_the_programs_for_openais_client_write_images(
    server: Server, tmp_path: Path, page: str, files: list[str]
) -> None:
    (program,) = blocks(page, "python")
    assert ADDRESS in program
    subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.url)], check=True, cwd=tmp_path, timeout=120
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(files)
    for name in files:
        with Image.open(tmp_path / name) as image:
            assert image.size == (512, 512)


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server by https, with a certificate that it has made, and with keys."""
    folder = tmp_path_factory.mktemp("vendors")
    stages: Any = {"prior": {"min_replicas": 1}, "decoder": {"min_replicas": 1}}
    model = tiny_model("glm-image", checkpoint=str(tiny.cached(SMALL_SIZES)), **stages)
    # Whoever runs the tests keeps their own certificate, and the checkpoint is not written once more.
    hub = os.environ.get("HF_HOME", str(Path.home() / ".cache/huggingface"))
    with served(
        config_file(folder, [model], auth=keys()), "TLS=1", HOME=str(folder), HF_HOME=hub, OTHER_KEY=OTHER_KEY
    ) as running:
        certificate = folder / ".local/share/glm-image-server/tls/certificate.pem"
        yield Endpoint(running.url, KEY, OTHER_KEY, certificate)


def run(vendors: Endpoint, command: list[str], program: str, cwd: Path = ROOT) -> str:
    """Runs an example with the test server's address and key, and returns its output."""
    assert "none" in program
    assert "127.0.0.1:8000" in program
    program = program.replace(ADDRESS, vendors.url).replace("127.0.0.1:8000", vendors.place)
    assert vendors.certificate
    folder = vendors.certificate.parents[4]
    return subprocess.run(
        [*command, re.sub(r"\bnone\b", vendors.key, program)],
        check=True,
        cwd=cwd,
        env=os.environ | {"HOME": str(folder)} | vendors.trust,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_three_lines_point_fals_python_client_to_the_server(vendors: Endpoint) -> None:
    (lines,), (program,) = blocks("docs/guides/fal.md", "sh"), blocks("docs/guides/fal.md", "python")
    assert len(lines.strip().splitlines()) == 3
    printed = run(vendors, ["bash", "-c"], f"{lines}\n{sys.executable} - <<'END'\n{program}END")
    assert "Completed(" in printed
    assert f"{vendors.url}/files/" in printed


@needs_node
def test_the_example_of_fals_javascript_client_works(vendors: Endpoint) -> None:
    (program,) = blocks("docs/guides/fal.md", "js")
    printed = run(vendors, ["node", "--input-type=module", "-e"], program, ROOT / "tests/http/js")
    assert printed.startswith(f"{vendors.url}/files/")


def test_the_example_of_zais_client_works(vendors: Endpoint) -> None:
    (program,) = blocks("docs/guides/zai.md", "python")
    printed = run(vendors, [sys.executable, "-c"], program)
    assert printed.startswith(f"{vendors.url}/files/")


def test_the_example_of_pixazos_api_works(vendors: Endpoint) -> None:
    (command,) = blocks("docs/guides/pixazo.md", "sh")
    command = command.replace("curl", f"curl --cacert {vendors.certificate}")
    assert json.loads(run(vendors, ["bash", "-c"], command))["status"] == "COMPLETED"


def test_every_program_of_the_manual_is_run() -> None:
    """The pages with programs are those that the tests above read."""
    with_programs = {
        str(page.relative_to(ROOT))
        for page in PAGES
        if re.search(r"^```(?:python|js)\n", page.read_text(), re.MULTILINE)
    }
    guides = {f"docs/guides/{name}.md" for name in ("openai", "fal", "zai")}
    assert with_programs == {"README.md", "docs/quickstart.md", *guides}
