"""Docstrings and descriptions are sentences that a reader understands without the code around them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file
    for folder in ("serve_app", "deployments", "training", "examples")
    for file in (ROOT / folder).rglob("*.py")
)
BAD_START = re.compile(r"(Of |By which|So many|What )")
BAD_WORDS = re.compile(r"\b(likewise|as above|see there)\b", re.IGNORECASE)


def texts(tree: ast.AST) -> Iterator[str]:
    """Yields docstrings, those of attributes included, and descriptions of fields and options."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.value.value
        elif isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            parts = (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
            yield "".join(part for part in parts if isinstance(part, str))


def problems(text: str) -> list[str]:
    found = [match[0] for match in [BAD_START.match(text.strip())] if match]
    return found + [match[0] for match in BAD_WORDS.finditer(text)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sentences_are_plain(file: Path) -> None:
    found = {text: bad for text in texts(ast.parse(file.read_text())) if (bad := problems(text))}
    assert not found


@pytest.mark.parametrize(
    "text",
    ["Of the newest unit.", "What is kept.", "Seconds; likewise.", "Steps, as above.", "So many rows."],
)
def test_a_riddle_is_found(text: str) -> None:
    assert problems(text)
    (seen,) = texts(ast.parse(f'X = 1\n"""{text}"""'))
    assert seen == text
