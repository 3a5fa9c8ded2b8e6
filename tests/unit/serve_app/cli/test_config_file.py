"""Config files: what is read, and the words about a key or a value that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.cli import config_file
from serve_app.cli.config_file import ConfigFileError
from tests.unit.serve_app.cli.files import ARGS, ROOT, changed

FILES = sorted(file for file in (ROOT / "configs").glob("*.yaml") if file.stem != "kustomization")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_of_the_repository_is_read_without_a_warning(file: Path) -> None:
    content, warnings = config_file.read(file)
    assert content.application.args.models
    assert not warnings


def read_with(folder: Path, changes: dict[str, Any]) -> list[str]:
    """Reads configs/tiny.yaml with other values, by dotted path; returns the warnings."""
    return config_file.read(changed(folder, changes))[1]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (f"{ARGS}.models.0.prior.max_batchsize", "unknown key; did you mean `max_batch_size`?"),
        (f"{ARGS}.limits.max_image", "unknown key; did you mean `max_images`?"),
        (f"{ARGS}.safety_checker.time_out_s", "unknown key; did you mean `timeout_s`?"),
        ("http_options.prot", "unknown key; did you mean `port`?"),
        ("logging_config", "unknown key; known keys: http_options, applications"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(tmp_path: Path, key: str, problem: str) -> None:
    with pytest.raises(ConfigFileError) as error:
        read_with(tmp_path, {key: 1})
    assert f"  {key}: {problem}" in str(error.value).splitlines()


def test_all_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError) as error:
        read_with(tmp_path, {f"{ARGS}.limits.max_steps": 0, "http_options.port": "high"})
    assert len(str(error.value).splitlines()) == 2


def test_an_old_key_gives_a_warning(tmp_path: Path) -> None:
    assert read_with(tmp_path, {f"{ARGS}.models.0.prior.rows": 2}) == [
        "prior.rows is now prior.max_batch_size; rename it"
    ]


@pytest.mark.parametrize("text", [": : :", "- a", "\x00"])
def test_a_file_that_is_not_a_configuration_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigFileError):
        config_file.read(tmp_path / "config.yaml")


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="No such file"):
        config_file.read(tmp_path / "nowhere.yaml")


def test_a_line_that_cannot_be_read_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("applications:\n  - key: 'secret\n")
    with pytest.raises(ConfigFileError, match="line 3: ") as error:
        config_file.read(tmp_path / "config.yaml")
    assert "secret" not in str(error.value)
