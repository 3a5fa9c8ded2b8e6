"""A check that fails or hangs is a finding, and a line shows no secrets."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.cli.doctor.findings import Finding, checked, fault, fine, public, sized


def test_a_finding_is_one_line() -> None:
    assert str(fine("all is\nwell")) == "ok  all is well"
    assert str(fault("it is broken", "mend it")) == "!!  it is broken: mend it"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://alice:secret@host/x", "at https://***@host/x"),
        ("s3://secret@host and ftp://a:s/e@c@host", "s3://***@host and ftp://***@host"),
        ("https://host/a@b", "https://host/a@b"),
        ("/home/alice/x, /home/alice", "~/x, ~"),
        ("/home/alice2/x", "/home/alice2/x"),
    ],
)
def test_credentials_and_the_home_folder_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert public(text) == shown


def test_a_home_that_is_the_root_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert public("/models/x") == "/models/x"


def test_a_check_that_fails_is_a_finding_after_its_others() -> None:
    def check() -> Iterator[Finding]:
        yield fine("a good one")
        Path("/nowhere").read_bytes()

    good, bad = checked("item", check)
    assert good == fine("a good one")
    assert not bad.ok
    assert bad.text.startswith("item: [Errno 2] No such file")


def test_a_check_that_hangs_is_a_finding() -> None:
    end = threading.Event()

    def check() -> Iterator[Finding]:
        yield fine("a good one")
        end.wait()

    good, bad = checked("item", check, patience_s=0.05)
    end.set()
    assert good.ok
    assert bad.text == "item: no answer in 0.05 s"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (2_500_000, "2.5 MB"), (35e9, "35.0 GB")]
)
def test_sizes_have_a_unit(size: float, text: str) -> None:
    assert sized(size) == text
