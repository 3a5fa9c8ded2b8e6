"""Checkpoints: complete, incomplete or broken, in a folder or in the Hub's cache."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from serve_app.cli.doctor import checkpoints
from serve_app.cli.doctor.findings import Finding
from serve_app.config import AppConfig
from tests.hub import COMMIT, REPOSITORY, cached, record_download, split_transformer

STAGE = {"device": "cpu"}
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny checkpoint, which the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def places(checkpoint: str | Path, revision: str | None = None, **more: Any) -> list[checkpoints.Place]:
    model = {"name": "m", "family": "glm_image", "checkpoint": str(checkpoint), "revision": revision}
    args = {"models": [model | {"prior": STAGE, "decoder": STAGE}], "auth": {"open": True}} | more
    return list(checkpoints.places(AppConfig.model_validate(args)))


def state(checkpoint: str | Path, revision: str | None = None) -> list[Finding]:
    (place,) = places(checkpoint, revision)
    return list(checkpoints.state(place))


def hashes(checkpoint: str | Path, revision: str | None = None) -> list[Finding]:
    (place,) = places(checkpoint, revision)
    return list(checkpoints.hashes(place))


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_built_in_checkpoints_need_nothing(name: str) -> None:
    (finding,) = state(name)
    assert str(finding) == f"ok  model m: checkpoint {name} comes with the server"
    assert not hashes(name)


def test_a_complete_folder(folder: Path) -> None:
    (finding,) = state(folder)
    assert finding.ok
    assert " is complete, " in finding.text


def test_a_folder_that_is_not_there_is_a_fault() -> None:
    (finding,) = state("/models/GLM-Image")
    assert finding.text == (
        "model m: checkpoint '/models/GLM-Image' is not a folder on this machine, nor built in (tiny, demo)"
    )
    assert finding.remedy.endswith("hf download OWNER/GLM-Image --local-dir /models/GLM-Image")
    (finding,) = state("glm-image")
    assert finding.remedy.startswith("correct it, or give `revision`")
    (finding,) = state("/models/GLM-Image", COMMIT)
    assert not finding.ok
    assert not hashes("/models/GLM-Image")


def test_a_file_that_was_cut_is_a_fault(folder: Path) -> None:
    content = (folder / VAE).read_bytes()
    (folder / VAE).write_bytes(content[:-10])
    (finding,) = state(folder)
    assert f"{VAE} has {len(content) - 10} bytes instead of {len(content)}" in finding.text
    assert f"{VAE} --local-dir {folder} --force-download" in finding.remedy
    (folder / "vae/config.json").write_text("")
    assert "vae/config.json is damaged (0 bytes)" in state(folder)[0].text


def test_missing_parts_are_named_with_their_size(folder: Path) -> None:
    first, _, third = split_transformer(folder)
    first.unlink()
    third.unlink()
    (finding,) = state(folder)
    assert not finding.ok
    names = ", ".join(str(part.relative_to(folder)) for part in (first, third))
    assert f"lacks {names} (" in finding.text


def test_many_missing_files_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in split_transformer(folder):
        part.unlink()
    monkeypatch.setattr(checkpoints, "SHOWN", 1)
    assert " and 2 more (" in state(folder)[0].text


def test_a_hub_checkpoint_in_the_cache(folder: Path, cache: Path) -> None:
    (finding,) = state(REPOSITORY, COMMIT)
    assert finding.ok
    assert "is not downloaded yet" in finding.text
    assert finding.text.endswith(f"hf download {REPOSITORY} --revision {COMMIT}")
    assert not hashes(REPOSITORY, COMMIT)

    parts = split_transformer(folder)
    downloaded = cached(folder, cache)
    (finding,) = state(REPOSITORY, COMMIT)
    assert "is complete" in finding.text

    missing = downloaded / parts[0].relative_to(folder)
    missing.unlink()
    (finding,) = state(REPOSITORY, COMMIT)
    assert finding.ok
    assert f"missing: {missing.relative_to(downloaded)} (" in finding.text


def test_what_cannot_be_downloaded_is_a_fault(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        (finding,) = state(REPOSITORY, COMMIT)
    assert not finding.ok
    assert finding.remedy.startswith("HF_HUB_OFFLINE=0 ")
    parts = split_transformer(folder)
    (cached(folder, cache) / parts[0].relative_to(folder)).unlink()
    monkeypatch.setattr(checkpoints, "free", lambda _: 10)
    (finding,) = state(REPOSITORY, COMMIT)
    assert not finding.ok
    assert "the disk has no room" in finding.text


def test_a_blob_with_another_hash_is_a_fault(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded = cached(folder, cache)
    (finding,) = hashes(REPOSITORY, COMMIT)
    assert finding.ok
    assert " files have the SHA-256 of their download" in finding.text
    assert "model m" in capsys.readouterr().err  # the progress

    (downloaded / VAE).write_bytes((downloaded / VAE).read_bytes()[:-1] + b"\1")
    wrong, _ = hashes(REPOSITORY, COMMIT)
    assert not wrong.ok
    assert f"{VAE} has another SHA-256" in wrong.text
    assert wrong.remedy.endswith(f"{REPOSITORY} {VAE} --revision {COMMIT} --force-download")


def test_a_folder_has_hashes_if_it_was_downloaded(folder: Path) -> None:
    (finding,) = hashes(folder)
    assert "no SHA-256 is known" in finding.text
    record_download(folder)
    (finding,) = hashes(folder)
    assert "files have the SHA-256" in finding.text


def test_helpers_have_checkpoints_too(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "safety_checker": {"classifier": {"checkpoint": str(tmp_path)}},
        "prompt_expander": {"chat_model": {"checkpoint": "tiny"} | STAGE},
    }
    model, checker, expander = places("tiny", **more)
    assert (model.flat, checker.flat, expander.flat) == (False, True, True)
    (finding,) = checkpoints.state(checker)
    assert str(finding).startswith(f"!!  safety checker: checkpoint {tmp_path} lacks ")
    assert next(checkpoints.state(expander)).ok
