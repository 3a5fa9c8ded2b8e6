"""The files of a checkpoint: where they are, which ones are missing, and which ones are broken.

Everything is read from the files themselves, without torch and without a connection. A checkpoint in
diffusers' layout has an index, `model_index.json`, and a folder for each component. One in transformers'
layout is one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from deployments.errors import CheckpointError
from deployments.identity import FILE_TYPES, MAX_HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

MODEL_INDEX = "model_index.json"
WEIGHT_INDEXES = "*model.safetensors.index.json"
"""Pattern of the files that say which file has which tensor. Variants, such as fp16, do not match it."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
SETTINGS = ("FeatureExtractor", "Processor", "Scheduler", "Tokenizer", "TokenizerFast")
"""Ends of the names of classes without weights."""
LFS_POINTER = re.compile(rb"version https://git-lfs[^\n]*\n(?:.*\n)*size (\d+)")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 2**23


class Source(Protocol):
    """A configuration with the place of a checkpoint; see `deployments.config`."""

    @property
    def checkpoint(self) -> str:
        """Folder, Hub id, or name of a built-in checkpoint."""

    @property
    def revision(self) -> str | None:
        """Commit of the Hub, or None."""


@dataclass(frozen=True)
class Gap:
    """Files that are missing.

    Attributes:
        files: their paths in the checkpoint.
        size: their bytes together; None if unknown.
    """

    files: tuple[str, ...]
    size: int | None = None


@dataclass(frozen=True)
class BrokenFile:
    """A file that cannot be used.

    Attributes:
        path: path in the checkpoint.
        size: its bytes.
        expected_size: bytes that it should have; None if its content cannot be read at all.
    """

    path: str
    size: int
    expected_size: int | None = None


@dataclass(frozen=True)
class Contents:
    """State of a checkpoint's files.

    Attributes:
        size: bytes of all files that are there.
        gaps: missing files.
        broken: broken files.
    """

    size: int
    gaps: tuple[Gap, ...]
    broken: tuple[BrokenFile, ...]


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison of files with their SHA-256.

    Attributes:
        equal: number of files that are as they should be.
        different: paths of the files that are not.
    """

    equal: int
    different: tuple[str, ...]


def folder_of(source: Source, built_in: Collection[str]) -> Path | None:
    """Returns the checkpoint's folder on this machine; None if the Hub has the checkpoint.

    Args:
        source: place of the checkpoint, which is not built in.
        built_in: names of the built-in checkpoints.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(source.checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if source.revision is None:
        raise CheckpointError(
            f"checkpoint {source.checkpoint!r} is not a folder on this machine, nor built in "
            f"({', '.join(built_in)}); correct it, or give `revision` (40 digits of a commit) for a Hub id"
        )
    return None


def cached_folder(source: Source) -> Path | None:
    """Returns the folder of a Hub's checkpoint in the cache; None if nothing of it was downloaded.

    Raises:
        ValueError: the checkpoint's name is not a Hub id.
    """
    try:
        return Path(snapshot_download(source.checkpoint, revision=source.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def declared_classes(folder: Path) -> dict[str, str]:
    """Returns the components that the index lists, with their classes.

    Raises:
        OSError: the index cannot be read.
        ValueError: it is no such index.
    """
    index = _mapping((folder / MODEL_INDEX).read_bytes())
    entries = {name: one for name, one in index.items() if isinstance(one, list) and len(one) == 2}
    return {name: entry[1] for name, entry in entries.items() if isinstance(entry[1], str)}


def inspect(folder: Path, *, flat: bool = False) -> Contents:
    """Returns the state of a checkpoint's files. Of large files, it reads the headers only.

    Args:
        folder: folder of the checkpoint.
        flat: whether it has transformers' layout.
    """
    findings: Iterator[Gap | BrokenFile]
    findings = _component(folder, folder, has_weights=True) if flat else _components(folder)
    found = list(findings)
    return Contents(
        size=sum(file.stat().st_size for file in _files(folder)),
        gaps=tuple(one for one in found if isinstance(one, Gap)),
        broken=tuple(one for one in found if isinstance(one, BrokenFile)),
    )


def bytes_to_compare(folder: Path) -> int:
    """Returns the bytes of the files that `compare` reads."""
    return sum(file.stat().st_size for file in _files(folder) if _recorded_sha256(folder, file))


def compare(folder: Path, report: Callable[[int], object]) -> Comparison:
    """Compares files with the SHA-256 that the download has recorded. Files without one are left out.

    The Hub has a SHA-256 of large files only.

    Args:
        folder: folder of the checkpoint.
        report: takes the number of bytes, each time some were read.
    """
    equal, different = 0, []
    for file in _files(folder):
        if recorded := _recorded_sha256(folder, file):
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    digest.update(chunk)
                    report(len(chunk))
            if digest.hexdigest() == recorded:
                equal += 1
            else:
                different.append(str(file.relative_to(folder)))
    return Comparison(equal, tuple(different))


def _recorded_sha256(folder: Path, file: Path) -> str | None:
    """Returns the SHA-256 that a file should have; None if unknown.

    In the Hub's cache, a file is a link to a blob that is named by it. In a folder that `hf download` has
    filled, a file beside it has the commit and, in the second line, the SHA-256.
    """
    if file.is_symlink():
        name = file.resolve().name
    else:
        record = folder / ".cache/huggingface/download" / f"{file.relative_to(folder)}.metadata"
        lines = record.read_text().splitlines() if record.is_file() else []
        name = lines[1] if len(lines) > 1 else ""
    return name if SHA256.fullmatch(name) else None


def _files(folder: Path) -> list[Path]:
    """Returns the files that the server may load. A link without its file is none."""
    found = chain.from_iterable(folder.rglob(f"*.{kind}") for kind in FILE_TYPES)
    return sorted(
        file for file in found if file.is_file() and not file.relative_to(folder).parts[0].startswith(".")
    )


def _components(folder: Path) -> Iterator[Gap | BrokenFile]:
    """Yields the problems of a checkpoint in diffusers' layout."""
    index = folder / MODEL_INDEX
    if not index.is_file():
        yield Gap((MODEL_INDEX,))
        return
    try:
        classes = declared_classes(folder)
    except ValueError:
        yield BrokenFile(MODEL_INDEX, index.stat().st_size)
        return
    for name, declared in classes.items():
        yield from _component(folder, folder / name, has_weights=not declared.endswith(SETTINGS))


def _component(root: Path, folder: Path, *, has_weights: bool) -> Iterator[Gap | BrokenFile]:
    """Yields the problems of one component.

    Args:
        root: folder of the checkpoint.
        folder: folder of the component.
        has_weights: whether it has weights, beside settings.
    """

    def path(file: Path) -> str:
        return str(file.relative_to(root))

    files = [file for file in _files(folder) if file.parent == folder]
    if not files:
        yield Gap((f"{path(folder)}/",))
        return
    for file in files:
        size = file.stat().st_size
        if file.match(WEIGHT_INDEXES):
            continue  # read with the weights
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except ValueError:
                yield BrokenFile(path(file), size)
        elif file.suffix == ".safetensors" and (expected := _whole_size(file)) != size:
            yield BrokenFile(path(file), size, expected)
    if has_weights:
        if not (folder / "config.json").is_file():
            yield Gap((path(folder / "config.json"),))
        yield from _missing_weights(root, folder)


def _missing_weights(root: Path, folder: Path) -> Iterator[Gap | BrokenFile]:
    """Yields the files with weights that a component lacks, and their index if it is broken."""
    weights = {file.name: file for file in folder.glob("*.safetensors") if file.is_file()}
    indexes = [file for file in folder.glob(WEIGHT_INDEXES) if file.is_file()]
    prefix = "" if folder == root else f"{folder.relative_to(root)}/"
    for index in indexes:
        try:
            content = _mapping(index.read_bytes())
            shards = set(map(str, content["weight_map"].values()))
        except (ValueError, LookupError, AttributeError):
            yield BrokenFile(prefix + index.name, index.stat().st_size)
            continue
        if missing := sorted(shards - weights.keys()):
            present = [_tensor_bytes(weights[name]) for name in shards & weights.keys()]
            yield Gap(tuple(prefix + name for name in missing), _rest(content.get("metadata"), present))
    if indexes:
        return
    if not weights:
        yield Gap((f"{prefix}*.safetensors",))
    elif all(map(SHARD.search, weights)):
        yield Gap((f"{prefix}{SHARD.sub('', min(weights))}.index.json",))


def _rest(metadata: Any, present: list[int | None]) -> int | None:
    """Returns the bytes of the tensors that are not present; None if unknown.

    Args:
        metadata: what an index says of all weights.
        present: bytes of the tensors in each file that is there; None if unknown.
    """
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    known = [size for size in present if size is not None]
    if not isinstance(total, int | float) or len(known) < len(present) or total <= sum(known):
        return None
    return int(total) - sum(known)


def _whole_size(file: Path) -> int | None:
    """Returns the bytes that a file of tensors should have, by its header; None if it has none.

    A file that only stands for one in Git LFS names the other's bytes.
    """
    header = _header(file)
    if header is None:
        with file.open("rb") as opened:
            pointer = LFS_POINTER.match(opened.read(1024))
        return int(pointer[1]) if pointer else None
    return 8 + header[0] + header[1]


def _tensor_bytes(file: Path) -> int | None:
    header = _header(file)
    return header[1] if header else None


def _header(file: Path) -> tuple[int, int] | None:
    """Returns the bytes of a file's header, and those of the tensors behind it; None if there is no header.

    https://huggingface.co/docs/safetensors/index#format
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return None
        try:
            tensors = _mapping(opened.read(length))
            ends = [int(one["data_offsets"][1]) for name, one in tensors.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError):
            return None
    return length, max(ends, default=0)


def _mapping(text: bytes) -> dict[str, Any]:
    """Returns the mapping that a JSON document has.

    Raises:
        ValueError: it is none.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a mapping")  # noqa: TRY004 - JSON's own errors are of this kind
    return content
