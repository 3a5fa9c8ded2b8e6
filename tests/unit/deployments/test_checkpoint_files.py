"""Missing and broken files of a checkpoint are found, by name and size, in every layout of a download."""

import importlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from deployments.checkpoint_files import (
    BrokenFile,
    Gap,
    bytes_to_compare,
    cached_folder,
    compare,
    folder_of,
    inspect,
)
from deployments.config import ClassifierConfig
from deployments.errors import CheckpointError
from deployments.families import FAMILIES
from deployments.families.z_image import tiny as z_image
from deployments.helpers.chat_model import tiny as chat_model
from deployments.helpers.image_classifier import tiny as image_classifier
from tests.hub import COMMIT, REPOSITORY, TRANSFORMER, cached, record_download, split_transformer

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny checkpoint, which the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def test_complete_checkpoints_have_no_problems(tiny_folder: Path) -> None:
    for checkpoint, flat in (
        (tiny_folder, False),
        (z_image.cached(), False),
        (chat_model.cached(), True),
        (image_classifier.cached(), True),
    ):
        contents = inspect(checkpoint, flat=flat)
        assert (contents.gaps, contents.broken) == ((), ()), checkpoint
        assert contents.size == sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


@pytest.mark.parametrize("change", [-100, 8])
def test_a_file_of_another_size_than_its_header_says_is_broken(folder: Path, change: int) -> None:
    content = (folder / VAE).read_bytes()
    size = len(content) + change
    (folder / VAE).write_bytes((content + bytes(8))[:size])
    assert inspect(folder).broken == (BrokenFile(VAE, size, len(content)),)


@pytest.mark.parametrize(
    "content", [b"", b"\x10\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]", b"<html>not found</html>"]
)
def test_a_file_that_is_none_of_tensors_is_broken(folder: Path, content: bytes) -> None:
    (folder / VAE).write_bytes(content)
    assert inspect(folder).broken == (BrokenFile(VAE, len(content), None),)


def test_a_file_that_stands_for_one_in_git_lfs_names_its_size(folder: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n".encode()
    (folder / VAE).write_bytes(pointer)
    assert inspect(folder).broken == (BrokenFile(VAE, len(pointer), 123456),)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "processor/tokenizer.json"])
def test_settings_that_were_cut_are_broken(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    assert [broken.path for broken in inspect(folder).broken] == [name]


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        ("model_index.json", "model_index.json"),
        ("vae/config.json", "vae/config.json"),
        (VAE, "vae/*.safetensors"),
        ("vae", "vae/"),
        ("scheduler/scheduler_config.json", "scheduler/"),
    ],
)
def test_a_missing_file_is_named(folder: Path, removed: str, missing: str) -> None:
    path = folder / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert inspect(folder).gaps == (Gap((missing,)),)


def test_missing_weights_of_a_flat_checkpoint_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_model.cached(), tmp_path / "checkpoint"))
    (folder / "model.safetensors").unlink()
    assert inspect(folder, flat=True).gaps == (Gap(("*.safetensors",)),)


def test_missing_parts_of_the_weights_have_names_and_a_size(folder: Path) -> None:
    first, second, third = split_transformer(folder)
    assert not inspect(folder).gaps
    size = sum(tensor.nbytes for part in (first, third) for tensor in load_file(part).values())
    first.unlink()
    third.unlink()
    names = tuple(str(part.relative_to(folder)) for part in (first, third))
    assert inspect(folder).gaps == (Gap(names, size),)
    second.write_bytes(b"")  # what is missing is then unknown
    assert inspect(folder).gaps == (Gap(names),)


def test_a_part_that_was_cut_is_broken(folder: Path) -> None:
    part = split_transformer(folder)[1]
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    contents = inspect(folder)
    assert contents.broken == (BrokenFile(str(part.relative_to(folder)), len(content) - 1, len(content)),)
    assert not contents.gaps


@pytest.mark.parametrize("content", [None, "{}", "[]", "{"])
def test_parts_without_a_usable_index(folder: Path, content: str | None) -> None:
    split_transformer(folder)
    name = f"{TRANSFORMER}.safetensors.index.json"
    if content is None:
        (folder / name).unlink()
        assert inspect(folder).gaps == (Gap((name,)),)
    else:
        (folder / name).write_text(content)
        assert [broken.path for broken in inspect(folder).broken] == [name]


def test_the_cache_of_the_hub_is_found_without_a_connection(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = ClassifierConfig(checkpoint=REPOSITORY, revision=COMMIT)
    assert folder_of(source, ()) is None
    assert cached_folder(source) is None
    folder = cached(tiny_folder, tmp_path)
    assert cached_folder(source) == folder
    assert not inspect(folder).gaps
    (folder / VAE).resolve().unlink()  # a link without its blob
    assert inspect(folder).gaps == (Gap(("vae/*.safetensors",)),)


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(ValueError, match="Repo id"):
        cached_folder(ClassifierConfig(checkpoint="/models/nowhere", revision=COMMIT))


def test_a_place_that_is_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'/models/nowhere' is not a folder .* \(tiny\); correct it"):
        folder_of(ClassifierConfig(checkpoint="/models/nowhere"), ["tiny"])


@pytest.mark.parametrize("kind", ["cache", "folder"])
def test_weights_are_compared_with_the_sha256_of_their_download(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "cache":
        folder = cached(folder, tmp_path / "cache")
    else:
        record_download(folder)
    weights = [file.relative_to(folder) for file in folder.rglob("*.safetensors")]
    read: list[int] = []
    assert compare(folder, read.append).equal == len(weights)
    assert sum(read) == bytes_to_compare(folder) == sum((folder / one).stat().st_size for one in weights)

    with (folder / VAE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([(folder / VAE).read_bytes()[-1] ^ 1]))
    assert not inspect(folder).broken  # its size is right
    compared = compare(folder, lambda _: None)
    assert (compared.equal, compared.different) == (len(weights) - 1, (VAE,))


def test_files_of_an_unknown_sha256_are_left_out(folder: Path) -> None:
    assert bytes_to_compare(folder) == 0
    assert compare(folder, lambda _: None).equal == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_its_built_in_checkpoints(name: str) -> None:
    module = importlib.import_module(f"{FAMILIES[name].package}.checkpoint")
    assert tuple(module.BUILT_IN) == FAMILIES[name].built_in
