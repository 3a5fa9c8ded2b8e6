"""The pages for people: links lead somewhere, paths and commands exist, tables are whole."""

import importlib.util
import itertools
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from serve_app.cli import command_line
from serve_app.jobs.tables import State

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder, pattern in (
        (ROOT, "*.md"),
        (ROOT / "docs", "**/*.md"),
        (ROOT / "examples", "**/*.md"),
        (ROOT / "k8s", "*.md"),
        (ROOT / "tests/gpu", "*.md"),
        (ROOT / "deployments", "**/*.md"),
    )
    for page in folder.glob(pattern)
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
SHELL = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def anchors(page: Path) -> set[str]:
    """Returns the anchors that a forge gives the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M
    )
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    slugs = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]
    repeated: Counter[str] = Counter()
    found = set()
    for slug in slugs:
        found.add(f"{slug}-{repeated[slug]}" if repeated[slug] else slug)
        repeated[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for groups in LINK.findall(CODE.sub("", text(page))):
        target = "".join(groups)
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def test_the_manual_lists_every_page() -> None:
    index = ROOT / "docs/README.md"
    listed = {
        (index.parent / "".join(groups).partition("#")[0]).resolve()
        for groups in LINK.findall(index.read_text())
    }
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= listed


@pytest.mark.parametrize("page", PAGES)
def test_no_table_has_an_empty_last_cell(page: str) -> None:
    pairs = itertools.pairwise([*text(page).splitlines(), ""])
    rows = [line for line, below in pairs if line.startswith("|") and not below.startswith("|-")]
    assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "<", "!["))]
    assert not [line for line in lines if len(line) > 120 and " " in line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_paths_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join([*SHELL.findall(text(page)), *re.findall(r"`(make [^`]*)`", text(page))])
    assert set(re.findall(r"\bmake ([a-z]+)\b", commands)) - {"the"} <= targets
    paths = re.findall(
        r"`((?:serve_app|deployments|configs|tests|examples|findings|k8s|docs)/[\w./-]*)`", text(page)
    )
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_valid(page: str) -> None:
    code = SHELL.findall(text(page)) + re.findall(r"`([^`\n]+)`", text(page))
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    for line in lines:
        if match := re.search(r"(?:glm-image-server|python -m serve_app) (?!COMMAND)(?=[a-z])(.*)", line):
            # CARD stands for a GPU's name.
            command_line().parse_args(shlex.split(match[1].replace("CARD", "4090"), comments=True))
        for module in re.findall(r"python -m ((?:tests|training|serve_app)[\w.]*)", line):
            assert importlib.util.find_spec(module), module


def test_the_events_of_the_log_and_of_jobs_are_those_of_the_code() -> None:
    streams, rest = text("docs/reference/events.md").split("## Events of a job")
    jobs, rest = rest.split("## Webhooks")
    webhooks, log = rest.split("## Log lines")
    sources = [
        file.read_text() for folder in ("serve_app", "deployments") for file in (ROOT / folder).rglob("*.py")
    ]
    named = re.findall(r"\"event\": \"(\w+)\"|\bevent=\"(\w+)\"", "\n".join(sources))
    assert _first_column(log) == {one or other for one, other in named}
    assert _first_column(jobs) == {*get_args(State), "error"}
    ended = set(get_args(State)) - {"queued", "running"}
    assert _first_column(webhooks) == {f"image.job.{state}" for state in ended}
    kinds = {
        f"image_{kind}.{event}" for kind in ("generation", "edit") for event in ("partial_image", "completed")
    }
    assert _first_column(streams) == {*kinds, "error"}


def _first_column(section: str) -> set[str]:
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)} - {"event", "type"}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_placeholders(page: str) -> None:
    assert not re.search(r"\{\{|PLACEHOLDER|TODO|TBD", text(page))


def test_the_readme_fits_a_few_screens() -> None:
    assert len(text("README.md").splitlines()) <= 130
