"""The README's examples, run unchanged except for the server's address and key."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.families.glm_image import tiny
from tests.conftest import needs_node
from tests.http.conftest import KEY, OTHER_KEY, Endpoint, keys
from tests.serve.conftest import ROOT, SMALL_SIZES, Server, config_file, served, tiny_model

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_curl_command_generates_an_image(server: Server) -> None:
    (command,) = (block for block in blocks("bash") if block.startswith("curl"))
    assert ADDRESS in command
    run = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, server.url)], check=True, capture_output=True, text=True
    )
    answer = json.loads(run.stdout)
    (shown,) = map(json.loads, blocks("json"))
    assert answer.keys() == shown.keys()
    assert answer["data"][0].keys() == shown["data"][0].keys()
    assert answer["data"][0]["seed"] == shown["data"][0]["seed"]
    assert answer["size"] == shown["size"]


def block(language: str, word: str) -> str:
    """Returns the only block of a language that contains the word."""
    (found,) = (block for block in blocks(language) if word in block)
    return found


def test_the_python_program_generates_and_edits_an_image(server: Server, tmp_path: Path) -> None:
    program = block("python", "OpenAI")
    assert ADDRESS in program
    subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.url)], check=True, cwd=tmp_path, timeout=120
    )
    for name in ("star.png", "green.png"):
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
    """Runs an example of the README with the test server's address and key, and returns its output."""
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
    lines, program = block("sh", "FAL_RUN_HOST"), block("python", "fal_client")
    assert len(lines.strip().splitlines()) == 3
    printed = run(vendors, ["bash", "-c"], f"{lines}\n{sys.executable} - <<'END'\n{program}END")
    assert "Completed(" in printed
    assert f"{vendors.url}/files/" in printed


@needs_node
def test_the_example_of_fals_javascript_client_works(vendors: Endpoint) -> None:
    program = block("js", "@fal-ai/client")
    printed = run(vendors, ["node", "--input-type=module", "-e"], program, ROOT / "tests/http/js")
    assert printed.startswith(f"{vendors.url}/files/")


def test_the_example_of_zais_client_works(vendors: Endpoint) -> None:
    printed = run(vendors, [sys.executable, "-c"], block("python", "zai"))
    assert printed.startswith(f"{vendors.url}/files/")


def test_the_example_of_pixazos_api_works(vendors: Endpoint) -> None:
    command = block("sh", "glm-image-request").replace("curl", f"curl --cacert {vendors.certificate}")
    assert json.loads(run(vendors, ["bash", "-c"], command))["status"] == "COMPLETED"


def test_the_readme_has_no_placeholders() -> None:
    assert not re.search(r"\{\{|PLACEHOLDER|TODO", README)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/operate/security.md",
        "k8s/README.md",
        "tests/gpu/README.md",
    ],
)
def test_no_table_has_an_empty_last_cell(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    pairs = itertools.pairwise([*lines, ""])
    rows = [line for line, below in pairs if line.startswith("|") and not below.startswith("|-")]
    assert rows
    assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named_targets = set(re.findall(r"\bmake ([a-z]+)\b", text))
    assert named_targets - {"serve", "the"} <= targets  # "make the circle green" is a prompt
    assert "serve" in targets
    named = re.findall(r"`((?:serve_app|deployments|configs|tests|dialects)/[\w./-]*)`", text)
    assert named
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "serve_app" / path).exists(), path
