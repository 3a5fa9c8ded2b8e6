"""Findings about the checkpoints of models, the safety checker and the prompt expander."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants
from tqdm import tqdm

from deployments import checkpoint_files
from deployments.errors import CheckpointError
from serve_app.cli.doctor.findings import fault, fine, program, sized
from serve_app.cli.doctor.machine import free

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.checkpoint_files import BrokenFile, Contents, Source
    from serve_app.cli.doctor.findings import Finding
    from serve_app.config import AppConfig

SHOWN = 4
"""Number of files that a line names."""


@dataclass(frozen=True)
class Place:
    """The place of a checkpoint.

    Attributes:
        name: name of what uses it.
        source: its configuration.
        built_in: names that stand for checkpoints of the server.
        flat: whether it has transformers' layout.
    """

    name: str
    source: Source
    built_in: tuple[str, ...] = ("tiny",)
    flat: bool = True


def places(config: AppConfig) -> Iterator[Place]:
    """Yields the places of a configuration's checkpoints."""
    for model in config.models:
        yield Place(f"model {model.name}", model, model.traits.built_in, flat=False)
    if config.safety_checker:
        yield Place("safety checker", config.safety_checker.classifier)
    if config.prompt_expander and config.prompt_expander.chat_model:
        yield Place("prompt expander", config.prompt_expander.chat_model)


def state(place: Place) -> Iterator[Finding]:
    """Yields whether a checkpoint is there, and which of its files are missing or broken."""
    source, what = place.source, f"{place.name}: checkpoint {place.source.checkpoint}"
    if source.checkpoint in place.built_in:
        yield fine(f"{what} comes with the server")
        return
    try:
        folder = checkpoint_files.folder_of(source, place.built_in)
        downloaded = folder or checkpoint_files.cached_folder(source)
    except CheckpointError as error:
        text, _, remedy = str(error).partition("; ")
        if source.checkpoint.startswith(("/", "~", ".")):
            remedy = f"correct the path, or run {_download(source)}"
        yield fault(f"{place.name}: {text}", remedy)
        return
    except ValueError:
        yield fault(f"{what} is neither a folder nor a Hub id", "correct it")
        return
    if downloaded is None:
        yield _not_downloaded(place, f"{what} is not downloaded yet")
        return
    contents = checkpoint_files.inspect(downloaded, flat=place.flat)
    for broken in contents.broken:
        yield fault(
            f"{what}: {broken.path} {_damage(broken)}", f"{_download(source, broken.path)} --force-download"
        )
    if contents.gaps and folder:
        yield fault(f"{what} lacks {_missing(contents)}", _download(source))
    elif contents.gaps:
        yield _not_downloaded(place, f"{what} is downloaded in part; missing: {_missing(contents)}", contents)
    elif not contents.broken:
        yield fine(f"{what} is complete, {sized(contents.size)}")


def hashes(place: Place) -> Iterator[Finding]:
    """Yields whether a checkpoint's files have the SHA-256 of their download. Shows progress on stderr."""
    source, what = place.source, f"{place.name}: checkpoint {place.source.checkpoint}"
    if source.checkpoint in place.built_in:
        return
    try:
        folder = checkpoint_files.folder_of(source, place.built_in) or checkpoint_files.cached_folder(source)
    except (CheckpointError, ValueError):
        return  # reported by `state`
    if folder is None:
        return
    total = checkpoint_files.bytes_to_compare(folder)
    with tqdm(
        total=total, desc=place.name, unit="B", unit_scale=True, leave=False, file=sys.stderr
    ) as progress:
        compared = checkpoint_files.compare(folder, progress.update)
    for path in compared.different:
        yield fault(f"{what}: {path} has another SHA-256", f"{_download(source, path)} --force-download")
    if compared.equal:
        yield fine(f"{what}: {compared.equal} files have the SHA-256 of their download")
    elif not compared.different:
        yield fine(f"{what}: no SHA-256 is known, since `hf download` has not made this folder")


def _not_downloaded(place: Place, text: str, contents: Contents | None = None) -> Finding:
    """Returns the finding that files come from the Hub when they are needed."""
    download = _download(place.source)
    if constants.HF_HUB_OFFLINE:
        return fault(f"{text}, and HF_HUB_OFFLINE is set", f"HF_HUB_OFFLINE=0 {download}")
    known = sum(gap.size or 0 for gap in contents.gaps) if contents else 0
    if free(constants.HF_HUB_CACHE) < known:
        return fault(f"{text}, for which the disk has no room", f"free {constants.HF_HUB_CACHE}")
    return fine(f"{text}; it is downloaded when it loads, or now by {download}")


def _missing(contents: Contents) -> str:
    """Returns the missing files, with their sizes as far as they are known."""
    parts = []
    for gap in contents.gaps:
        names = ", ".join(gap.files[:SHOWN])
        if len(gap.files) > SHOWN:
            names += f" and {len(gap.files) - SHOWN} more"
        parts.append(f"{names} ({sized(gap.size)})" if gap.size else names)
    return ", ".join(parts)


def _damage(broken: BrokenFile) -> str:
    if broken.expected_size is None:
        return f"is damaged ({sized(broken.size)})"
    return f"has {broken.size} bytes instead of {broken.expected_size}"


def _download(source: Source, *files: str) -> str:
    """Returns the command that downloads a checkpoint, or some files of it."""
    command = [program("hf"), "download"]
    if source.revision and not Path(source.checkpoint).expanduser().is_dir():
        command += [source.checkpoint, *files, "--revision", source.revision]
    else:
        name = Path(source.checkpoint).name
        command += [f"OWNER/{name}", *files, "--local-dir", source.checkpoint]
    return " ".join(command)
