"""The pages of `docs/reference` say what the code says."""

import pytest

from serve_app.config import AppConfig
from tests.docs.reference import FOLDER, PAGES, keys


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_keys_of_nested_parts_are_listed_once() -> None:
    rows = keys(AppConfig)
    assert any(row.startswith("| `models[].prior.max_batch_size` | `8` |") for row in rows)
    assert len({row.split("|")[1] for row in rows}) == len(rows) > 90
