"""Tests of the page's files: types, format, size and preloads."""

import gzip
import re
import subprocess
from pathlib import Path

from serve_app import playground
from serve_app.dialects.openai.schemas import QUALITIES
from tests.conftest import needs_node

FOLDER = Path(__file__).parent
PAGE = (playground.FOLDER / "index.html").read_text()
FILES = sorted((playground.FOLDER / "static").iterdir())
MAX_BYTES = 40_000
"""Limit of the compressed page: two seconds at 160 kbit/s."""


@needs_node
def test_types_are_correct() -> None:
    subprocess.run([FOLDER / "node_modules/.bin/tsc", "-p", FOLDER], check=True, timeout=120)


@needs_node
def test_files_are_formatted() -> None:
    prettier, config = FOLDER / "node_modules/.bin/prettier", FOLDER / "package.json"
    subprocess.run([prettier, "--config", config, "--check", playground.FOLDER], check=True, timeout=120)


def test_the_page_is_small() -> None:
    sent = [gzip.compress(file.read_bytes()) for file in FILES] + [gzip.compress(PAGE.encode())]
    assert sum(map(len, sent)) < MAX_BYTES


def test_all_modules_are_preloaded() -> None:
    named = set(re.findall(r'(?:href|src)="playground/([^"]*)"', PAGE))
    assert named == {file.name for file in FILES}


def test_qualities_have_the_steps_of_the_api() -> None:
    listed = re.findall(r'<option value="([a-z]+)" data-steps="([0-9]+)">', PAGE)
    assert {name: int(steps) for name, steps in listed} == dict(QUALITIES.values())
