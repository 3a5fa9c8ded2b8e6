"""Writes the reference of errors, `docs/reference/errors.md`, from the maps of the code."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping

from serve_app.dialects import pixazo, zai
from serve_app.dialects.fal import errors as fal
from serve_app.dialects.openai.errors import error_body
from serve_app.dialects.openai.schemas import error_type
from serve_app.error_codes import CODES, GROUPS
from serve_app.errors import InvalidParameter
from serve_app.http.errors import RETRIED_BY_CLIENTS

WIDTH = 120

INTRODUCTION = """
Every error has a message for people and a code for programs. The message says what is wrong and what to do.
Messages may change. Codes stay. This page lists all codes of the server.

In the OpenAI API, and for [jobs](#jobs) and the server's own routes, an error has this form:
"""
FIELDS = """
`param` is the parameter at fault, or null. `type` follows from the HTTP status. A stream that fails ends with
an `error` event of this form. The answer to a failed job has status 200, and the job's `error` has the four
fields. The APIs of [fal](#fal), [Z.ai](#zai) and [Pixazo](#pixazo) have their own forms and codes.
"""
HEADERS = {
    "`x-request-id`": "Every answer has it: the id that the client sent, or a new one. The log has it too.",
    "`Retry-After`": "Seconds to wait before the request is sent again.",
    "`x-should-retry: false`": "The same request would get the same error again. OpenAI's clients then do "
    "not repeat it. Without the header they repeat a request after {retried}.",
}
FAL = """
Most errors have the form `{{"detail": "…", "error_type": "…"}}`. An error of status 400 has 422 here. Its
form is `{{"detail": [{{"loc": ["body", "prompt"], "msg": "…", "type": "…"}}]}}`. The header
`X-Fal-Error-Type` has the type too. `X-Fal-Retryable` says whether the same request may succeed later.

fal's clients repeat a request after {retried}, whatever the headers say. If that would be in vain, the status
is 500 instead.
"""
ZAI = """
An error has the form `{"error": {"code": "…", "message": "…"}}`. A failed task has the same `error`. If an
image was flagged, there is a `content_filter` too. [`model_not_found`](#model_not_found) has status 400 here.
"""
PIXAZO = """
An error has the form `{{"error": {{"code": "…", "message": "…"}}}}`. The routes of edits have the form
`{{"error": "the message", "code": "…"}}`, and {edits}. Some messages are those of Pixazo's documentation.

The answer to a failed request has status 200 and an `error` of the first form. Its `status` is `ERROR` if the
server is at fault, and `FAILED` otherwise. {faults} count as faults of the request or the model.
"""


def errors() -> str:
    """Returns the page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "<!-- Written by `make docs`. The texts are in serve_app/error_codes.py. -->"
    yield "# Errors"
    yield ""
    yield from _wrapped(INTRODUCTION)
    example = error_body(InvalidParameter("n", "must be 1 to 10, not 11"))
    yield from ("```json", json.dumps({"error": vars(example)}, indent=2), "```", "")
    yield from _wrapped(FIELDS)
    retried = ", ".join(str(status) for status in sorted(RETRIED_BY_CLIENTS) if status < 500) + " or 5xx"
    headers = {name: meaning.format(retried=retried) for name, meaning in HEADERS.items()}
    yield from _table(("Header", "Meaning"), headers.items())
    statuses = sorted({status for entry in CODES.values() for status in entry.statuses})
    rows = [
        (
            str(status),
            f"`{error_type(status)}`",
            ", ".join(_link(code) for code, entry in CODES.items() if status in entry.statuses),
        )
        for status in statuses
    ]
    yield from _table(("Status", "`type`", "`code`"), rows)
    for title, group in GROUPS.items():
        yield f"## {title}"
        yield ""
        for code, entry in group.items():
            yield f"### `{code}`"
            yield ""
            yield from _wrapped(f"HTTP {' or '.join(map(str, entry.statuses))}. {entry.cause}")
            yield from _wrapped(f"**What to do:** {entry.remedy}")
    yield "## fal"
    yield ""
    yield from _wrapped(FAL.format(retried=_listed(map(str, fal.RETRIED), "or")))
    yield from _translations("`error_type`", fal.TYPES, fal.TYPES_BY_STATUS, "the code of the OpenAI API")
    yield "## Z.ai"
    yield ""
    yield from _wrapped(ZAI)
    yield from _translations("`code`", zai.CODES, zai.CODES_BY_STATUS, "the HTTP status, such as `500`")
    yield "## Pixazo"
    yield ""
    edits = _listed(f"`{other}` instead of `{code}`" for code, other in pixazo.EDIT_CODES.items())
    faults = _listed(map(_link, pixazo.REQUESTS_FAULTS))
    yield from _wrapped(PIXAZO.format(edits=edits, faults=faults))
    otherwise = "the name of the HTTP status, such as `SERVICE_UNAVAILABLE`"
    yield from _translations("`code`", pixazo.CODES, pixazo.CODES_BY_STATUS, otherwise)


def _translations(
    title: str, by_code: Mapping[str, str], by_status: Mapping[int, str], otherwise: str
) -> Iterator[str]:
    """Yields the table of another API's codes.

    Args:
        title: the API's name for them.
        by_code: the API's codes by ours.
        by_status: the API's codes of all other errors, by the HTTP status.
        otherwise: the API's code of errors that are in neither table.
    """
    ours: dict[str, list[str]] = {}
    for code, other in by_code.items():
        ours.setdefault(other, []).append(_link(code))
    for other in dict.fromkeys(by_status.values()):
        statuses = _listed(str(status) for status, one in by_status.items() if one == other)
        ours.setdefault(other, []).append(f"all other errors of status {statuses}")
    rows = [(f"`{other}`", ", ".join(codes)) for other, codes in sorted(ours.items())]
    yield from _table((title, "Errors"), [*rows, (otherwise, "all others")])


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _wrapped(text: str) -> Iterator[str]:
    """Yields the lines of paragraphs. Code in a line is not broken."""
    unbroken = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    for paragraph in unbroken.strip().split("\n\n"):
        for line in textwrap.wrap(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False):
            yield line.replace("\0", " ")
        yield ""


def _listed(texts: Iterable[str], word: str = "and") -> str:
    """Returns texts as a list in a sentence."""
    *first, last = texts
    return f"{', '.join(first)} {word} {last}" if first else last


def _link(code: str) -> str:
    return f"[`{code}`](#{code})"
