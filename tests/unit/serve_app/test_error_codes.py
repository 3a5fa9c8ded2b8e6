"""Every code that a client can get has an entry with its statuses, and every entry has an error.

The codes are found in the source: in each call of a kind of error, and in the statuses of the web framework.
"""

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import get_args

import fastapi.routing
import pytest
import starlette.requests
import starlette.routing
import starlette.staticfiles
from pydantic import BaseModel

from serve_app.config import AppConfig
from serve_app.error_codes import CODES, GROUPS
from serve_app.errors import RequestError
from serve_app.http import application  # noqa: F401 - it imports all kinds of errors
from serve_app.http.errors import STATUSES, ProtocolError
from tests.unit.test_words import problems

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "serve_app").rglob("*.py"))
FRAMEWORK = [
    Path(module.__file__ or "")
    for module in (fastapi.routing, starlette.requests, starlette.routing, starlette.staticfiles)
]
"""Modules of the web framework that the routes use. The application answers their `HTTPException`s."""
TAKES_A_CODE = {"_unauthorized": 401}
"""Functions that make an error with a given code, and its status."""
MAX_WORDS = 25

Found = dict[str, set[int]]
"""Codes, and the statuses of each."""


def name_of(node: ast.AST | None) -> str:
    """Returns the last part of a dotted name; an empty text for any other expression."""
    return getattr(node, "attr", None) or getattr(node, "id", None) or ""


def argument(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def kinds_of_errors() -> dict[str, type[RequestError]]:
    """Returns the classes of errors, by name."""
    found: dict[str, type[RequestError]] = {}
    waiting: list[type[RequestError]] = [RequestError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("serve_app."):  # other tests have kinds of their own
            found[kind.__name__] = kind
    return found


def statuses_of_framework(trees: Collection[ast.AST]) -> set[int]:
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    raised = [call for call in calls if name_of(call.func) == "HTTPException"]
    return {ast.literal_eval(argument(call, "status_code") or call.args[0]) for call in raised}


def constants_in(trees: Collection[ast.Module]) -> Iterator[tuple[str, str]]:
    """Yields the names and values of the modules' texts."""
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield name_of(node.targets[0]), str(node.value.value)


class Collector(ast.NodeVisitor):
    """Collects the codes of errors. A code that it cannot read is an `AssertionError`."""

    def __init__(self, constants: Mapping[str, str], of_framework: Collection[int]) -> None:
        self.found: Found = {}
        self._constants = constants
        self._of_framework = of_framework
        self._kinds = kinds_of_errors()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(name_of(base) in self._kinds for base in node.bases):
            assert node.name in self._kinds, f"the application does not import {node.name}"
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in TAKES_A_CODE:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name, code = name_of(node.func), argument(node, "code")
        codes = [] if code is None else self._codes(code)
        if name in TAKES_A_CODE:
            assert codes, ast.unparse(node)
            self._add(codes, TAKES_A_CODE[name])
        elif name in self._kinds:
            assert codes is not None, f"the code cannot be read: {ast.unparse(node)}"
            kind = self._kinds[name]
            for status in self._statuses(node, kind):
                default = HTTPStatus(status).name.lower() if kind is ProtocolError else kind.CODE
                self._add([default] if code is None else codes, status)
        else:
            assert not codes, f"is this an error? {ast.unparse(node)}"

    def _add(self, codes: Collection[str], status: int) -> None:
        for code in codes:
            self.found.setdefault(code, set()).add(status)

    def _codes(self, code: ast.expr) -> list[str] | None:
        """Returns the codes that an expression may have; None if it is not clear.

        None of its own has the code of another error.
        """
        if isinstance(code, ast.Constant):
            return [str(code.value)]
        if isinstance(code, ast.IfExp):
            both = [self._codes(code.body), self._codes(code.orelse)]
            return None if None in both else [one for codes in both for one in codes or ()]
        if name_of(code) in self._constants:
            return [self._constants[name_of(code)]]
        return [] if isinstance(code, ast.Attribute) and code.attr == "code" else None

    def _statuses(self, call: ast.Call, kind: type[RequestError]) -> Collection[int]:
        if kind is not ProtocolError:
            return [next(STATUSES[base] for base in kind.__mro__ if base in STATUSES)]
        status = argument(call, "status")
        assert status is not None
        return self._of_framework if name_of(status) == "status_code" else [ast.literal_eval(status)]


def codes_in(*sources: str, framework: Collection[str] = ()) -> Found:
    """Returns the codes of the errors that these modules raise."""
    trees = [ast.parse(source) for source in sources]
    of_framework = statuses_of_framework([*trees, *map(ast.parse, framework)])
    collector = Collector(dict(constants_in(trees)), of_framework)
    for tree in trees:
        collector.visit(tree)
    return collector.found


def test_every_code_has_an_entry_and_every_entry_a_code() -> None:
    found = codes_in(
        *(file.read_text() for file in FILES), framework=[file.read_text() for file in FRAMEWORK]
    )
    assert {code: set(entry.statuses) for code, entry in CODES.items()} == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("Busy('Wait.')", {"busy": {429}}),
        ("errors.Invalid('No.')\nConflict('No.')", {"invalid_value": {400, 409}}),
        ("Failed('No.', code='lost')", {"lost": {500}}),
        ("LOST = 'lost'\nFailed('No.', code=LOST)", {"lost": {500}}),
        ("Gone('No.', code='one' if old else 'two')", {"one": {410}, "two": {410}}),
        ("ProtocolError('No.', status=418)", {"im_a_teapot": {418}}),
        ("ProtocolError('No.', status=418, code='tea')", {"tea": {418}}),
        (
            "raise HTTPException(402)\nProtocolError('No.', status=error.status_code)",
            {"payment_required": {402}},
        ),
        ("_unauthorized('No.', code='no_key')", {"no_key": {401}}),
        ("Invalid('No.', code=self.code)", {}),
        ("Error(code=code, message='No.')", {}),
    ],
)
def test_a_code_is_found(source: str, found: Found) -> None:
    assert codes_in(source) == found


@pytest.mark.parametrize(
    "source",
    [
        "Failed('No.', code=some_code())",
        "Failed('No.', code=code)",
        "Failed('No.', code='one' if old else other)",
        "partial(Failed, code='lost')",
        "class Lost(Failed):\n    pass",
    ],
)
def test_a_code_that_cannot_be_read_is_a_failure(source: str) -> None:
    with pytest.raises(AssertionError):
        codes_in(source)


def test_no_code_is_in_two_groups() -> None:
    assert sum(map(len, GROUPS.values())) == len(CODES)


@pytest.mark.parametrize("code", CODES)
def test_an_entry_has_short_sentences(code: str) -> None:
    for text in (CODES[code].cause, CODES[code].remedy):
        assert text.endswith(".")
        assert not problems(text)
        for sentence in re.split(r"(?<=[.?!]) ", text):
            assert 1 < len(sentence.split()) <= MAX_WORDS, sentence


def part_of(annotation: object) -> type[BaseModel] | None:
    """Returns the model of a section of the configuration; None if the annotation is of a plain value."""
    parts = (annotation, *get_args(annotation))
    return next((one for one in parts if isinstance(one, type) and issubclass(one, BaseModel)), None)


def is_key(text: str) -> bool:
    """Returns whether the configuration has a key, such as `models[].name`."""
    section: type[BaseModel] | None = AppConfig
    for name in text.replace("[]", "").split("."):
        if section is None or name not in section.model_fields:
            return False
        section = part_of(section.model_fields[name].annotation)
    return True


def test_every_key_of_the_configuration_exists() -> None:
    spans = [
        span for entry in CODES.values() for span in re.findall(r"`([^`]+)`", entry.cause + entry.remedy)
    ]
    sections = "|".join(AppConfig.model_fields)
    keys = [span.partition(":")[0] for span in spans if re.match(rf"({sections})(\[\])?\.", span)]
    assert len(keys) > 20
    assert [key for key in keys if not is_key(key)] == []
