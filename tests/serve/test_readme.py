"""The README's first requests, run as they stand there against a server of our own address."""

import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.serve.conftest import ROOT, Server

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_curl_line_makes_an_image(server: Server) -> None:
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


def test_the_python_program_makes_and_edits_an_image(server: Server, tmp_path: Path) -> None:
    (program,) = blocks("python")
    assert ADDRESS in program
    subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, server.url)], check=True, cwd=tmp_path, timeout=120
    )
    for name in ("boat.png", "blue.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (512, 512)


def test_nothing_is_left_to_be_filled_in() -> None:
    assert not re.search(r"\{\{|PLACEHOLDER|TODO", README)


def test_every_make_target_file_and_module_that_it_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"serve"} <= targets
    assert "serve" in targets
    named = re.findall(r"`((?:serve_app|deployments|configs|tests|dialects)/[\w./-]*)`", README)
    assert named
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "serve_app" / path).exists(), path
