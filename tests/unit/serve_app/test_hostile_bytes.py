"""Hostile bytes are rejected or accepted, and never a fault."""

import gc

import pytest

from tests import fuzz
from tests.http import stages

MUTATIONS = {
    "picture": 1000,
    "sealed_picture": 1000,
    "data_url": 300,
    "json_body": 150,
    "form": 300,
    "headers": 50,
}


# Starlette leaves the file of a part that does not end to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutations_of_what_is_valid_cause_no_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in ("PRIOR_SECONDS", "DECODER_SECONDS"):
        monkeypatch.setattr(stages, seconds, 0)
    for data in fuzz.corpus(name, MUTATIONS[name]):
        try:
            fuzz.TARGETS[name](data)
        except Exception as error:
            error.add_note(f"the bytes: {data!r:.2000}")
            raise
    gc.collect()  # the warning must come here, not in the next test
