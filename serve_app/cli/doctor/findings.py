"""Findings: a line for each item, without secrets."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PATIENCE_S = 10.0
"""Seconds that a check may take. A disk or a server that does not answer would take minutes."""
CREDENTIALS = re.compile(r"//(?:[^\s/:@]*:\S*|[^\s/@]+)@")
UNITS = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))


@dataclass(frozen=True)
class Finding:
    """The result of checking one item.

    Attributes:
        ok: whether the item is as it should be.
        text: the item and its state.
        remedy: what to do about it; empty if it is ok.
    """

    ok: bool
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """Returns the finding's line."""
        return f"ok  {public(self.text)}" if self.ok else f"!!  {public(f'{self.text}: {self.remedy}')}"


def fine(text: str) -> Finding:
    """Returns the finding that an item is as it should be."""
    return Finding(True, text)


def fault(text: str, remedy: str) -> Finding:
    """Returns the finding that something has to be done about an item."""
    return Finding(False, text, remedy)


def public(text: str) -> str:
    """Returns a text in one line, without the credentials in URLs and the name in the user's home folder."""
    text = CREDENTIALS.sub("//***@", " ".join(text.split()))
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)


def checked(
    name: str, check: Callable[[], Iterable[Finding]], patience_s: float | None = PATIENCE_S
) -> list[Finding]:
    """Returns the findings of a check. An error, and a check that does not end, are findings too.

    Args:
        name: name of the item.
        check: finds something.
        patience_s: seconds to wait for its end, or None.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            for finding in check():
                found.append(finding)  # noqa: PERF402 - those before an error count
        except Exception as error:  # noqa: BLE001 - an examination goes on, whatever is broken
            found.append(fault(f"{name}: {reason(error)}", "correct that, and examine it again"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        hanging = fault(f"{name}: no answer in {patience_s:g} s", "find out whether its disk or server hangs")
        return [*found, hanging]
    return found


def reason(error: BaseException) -> str:
    """Returns the first line of an error, and its kind."""
    text, kind = str(error).strip().partition("\n")[0], type(error).__name__
    return f"{text} ({kind})" if text else kind


def sized(size: float) -> str:
    """Returns a number of bytes as text."""
    for unit, factor in UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def program(name: str) -> str:
    """Returns the path of a program of this Python's environment, for a command to paste."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
