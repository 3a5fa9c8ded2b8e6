"""Tests of the pages' files: types, format, size and preloads."""

import gzip
import re
import subprocess
from pathlib import Path

from serve_app import playground, reference
from serve_app.dialects.openai.schemas import QUALITIES
from tests.conftest import needs_node

FOLDER = Path(__file__).parent
PAGE = (playground.FOLDER / "index.html").read_text()
FILES = sorted(file for file in playground.STATIC.iterdir() if file.stem != "operator")
"""Files of the page at `/`."""
MAX_BYTES = 81_920
MAX_SENT_BYTES = 40_000
"""Limit of the compressed page: two seconds at 160 kbit/s."""


@needs_node
def test_types_are_correct() -> None:
    subprocess.run([FOLDER / "node_modules/.bin/tsc", "-p", FOLDER], check=True, timeout=120)


@needs_node
def test_files_are_formatted() -> None:
    prettier, config = FOLDER / "node_modules/.bin/prettier", FOLDER / "package.json"
    folders = (playground.FOLDER, reference.FOLDER)
    subprocess.run([prettier, "--config", config, "--check", *folders], check=True, timeout=120)


def test_the_page_is_small() -> None:
    files = [file.read_bytes() for file in FILES] + [PAGE.encode()]
    assert sum(map(len, files)) <= MAX_BYTES
    assert sum(len(gzip.compress(file)) for file in files) < MAX_SENT_BYTES


def test_all_files_are_loaded_at_once() -> None:
    named = re.findall(r'(?:href|src)="playground/([^"]*)"', PAGE)
    named += re.findall(r"<playground/([^>]*)>; rel=modulepreload", playground.PRELOADS)
    assert set(named) == {file.name for file in FILES}


def test_the_operators_page_loads_what_there_is() -> None:
    page = (playground.FOLDER / "operator.html").read_text()
    named = set(re.findall(r'(?:href|src)="playground/([^"]*)"', page))
    assert {"operator.js", "operator.css"} < named <= {file.name for file in playground.STATIC.iterdir()}


def test_qualities_have_the_steps_of_the_api() -> None:
    listed = re.findall(r'<option value="([a-z]+)" data-steps="([0-9]+)">', PAGE)
    assert {name: int(steps) for name, steps in listed} == dict(QUALITIES.values())
