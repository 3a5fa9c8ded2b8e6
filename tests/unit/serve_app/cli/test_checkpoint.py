"""The command `checkpoint`: its findings about a folder, and the small checkpoint that it writes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.cli import main

Command = Callable[..., tuple[object, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command; returns its exit status, with standard output."""

    def run(*arguments: str | Path) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["glm-image-server", "checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def folder(tmp_path: Path, command: Command) -> Path:
    status, out = command("tiny", "z_image", tmp_path / "small", "--text-layers", "2")
    assert (status or 0, out.startswith(f"wrote {tmp_path / 'small'} (")) == (0, True)
    return tmp_path / "small"


def test_a_whole_checkpoint_is_complete(command: Command, folder: Path) -> None:
    status, out = command("check", folder)
    assert (status, out.startswith(f"ok  small: checkpoint {folder} is complete, ")) == (0, True)


def test_a_missing_file_is_named_with_the_command_that_downloads_it(command: Command, folder: Path) -> None:
    (weights,) = (folder / "vae").glob("*.safetensors")
    weights.unlink()
    status, out = command("check", folder)
    assert status == 1
    assert f"lacks vae/*.safetensors: {Path(sys.executable).with_name('hf')}" in out.replace(
        ".venv/bin/hf", str(Path(sys.executable).with_name("hf"))
    )
    assert out.rstrip().endswith(f"download OWNER/small --local-dir {folder}")


def test_a_damaged_file_is_named(command: Command, folder: Path) -> None:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    status, out = command("check", folder)
    assert (status, f"transformer/{weights.name} " in out) == (1, True)


def test_hashes_of_a_folder_that_was_not_downloaded_are_unknown(command: Command, folder: Path) -> None:
    status, out = command("check", folder, "--hashes")
    assert (status, "no SHA-256 is known" in out) == (0, True)


def test_a_path_that_is_no_folder_is_told(command: Command, tmp_path: Path) -> None:
    status, out = command("check", tmp_path / "none")
    assert (status, out) == (1, f"!!  {tmp_path / 'none'} is not a folder: correct the path\n")
