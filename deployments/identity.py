"""The identity of a model: a short text that is equal for equal pixels.

A job keeps the identity of the model that it was submitted to, and only a model with the same identity makes
it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.config import ModelConfig, StageConfig

FILE_TYPES = ("json", "jinja", "model", "safetensors", "txt")
"""Suffixes of a checkpoint's files: settings, vocabularies and safe weights."""
SAMPLE_BYTES = 4096
"""Bytes read of each tensor. Training changes all of a tensor, and 34 GB would take minutes to read."""
MAX_HEADER_BYTES = 100_000_000
"""https://huggingface.co/docs/safetensors/index#format"""
FAMILIES_FOLDER = Path(__file__).parent / "families"


def identity(model: ModelConfig) -> str:
    """Returns a model's identity: its family, and a digest of what decides its pixels.

    That is the content of its checkpoint, or its commit on the Hub, and every option that changes pixels.
    Names and folders do not count, nor do default parameters, which a request has by the time it is stored.

    Two things escape it: the versions of the libraries and the kind of GPU, which change pixels by rounding.
    Identities are stored. Another rule here would make the jobs of older servers wait for ever.
    """
    facts = {
        "checkpoint": _content(model),
        "prior": _arithmetic(model.prior) | ({"pass": model.gpu_pass} if model.gpu_pass else {}),
        "decoder": _arithmetic(model.decoder) | model.decoder.options_that_change_pixels,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{model.family}-{digest[:16]}"


def _arithmetic(stage: StageConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": stage.device, "dtype": stage.dtype}
    return facts | {"cpu_threads": stage.cpu_threads} if stage.device == "cpu" else facts


def _content(model: ModelConfig) -> str:
    """Returns a text that stands for a checkpoint's content.

    It is the name for a checkpoint that is neither a folder on this machine nor has a commit: one with random
    weights, or a folder that only the stages' machines have.
    """
    folder = Path(model.checkpoint).expanduser()
    if model.checkpoint.isidentifier() and (FAMILIES_FOLDER / model.family / model.checkpoint).is_dir():
        folder = FAMILIES_FOLDER / model.family / model.checkpoint / "checkpoint"  # it comes with the server
    return _digest(folder) if folder.is_dir() else model.revision or model.checkpoint


def _digest(folder: Path) -> str:
    """Returns a digest of a checkpoint's files: their names, settings and tensors; see `SAMPLE_BYTES`."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in FILE_TYPES for path in folder.rglob(f"*.{kind}")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        parts = _samples(path) if path.suffix == ".safetensors" else [path.read_bytes()]
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    """Yields a file's header and the beginning of each of its tensors. The loader reports broken files."""
    with path.open("rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        header = file.read(min(length, MAX_HEADER_BYTES))
        yield size + header
        with suppress(ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError):
            tensors = json.loads(header)
            begins = [one["data_offsets"][0] for name, one in tensors.items() if name != "__metadata__"]
            for begin in sorted(begins):
                file.seek(8 + length + begin)
                yield file.read(SAMPLE_BYTES)
