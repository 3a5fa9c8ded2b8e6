"""The command `checkpoint`: checks the files of a checkpoint, or writes a small one with random weights."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

from deployments.families import FAMILIES

HELP = "check a checkpoint's files, or write a small one"
KINDS = {
    **{name: family.package for name, family in FAMILIES.items()},
    "chat_model": "deployments.helpers.chat_model",
    "image_classifier": "deployments.helpers.image_classifier",
}
"""The package of each kind of checkpoint: those of models, the prompt expander's and the safety checker's."""


@dataclass(frozen=True)
class _Folder:
    """A folder with a checkpoint, as the doctor examines it."""

    checkpoint: str
    revision: None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="find missing and damaged files of a downloaded checkpoint")
    check.description = (
        "Find missing and damaged files of a downloaded checkpoint, and print the command that downloads "
        "them. The exit status is 1 if there are any."
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="such as /models/GLM-Image")
    check.add_argument(
        "--hashes",
        action="store_true",
        help="read all weights, and compare them with the SHA-256 of their download; takes minutes",
    )
    check.set_defaults(run=_check)
    tiny = commands.add_parser(
        "tiny", help="write a small checkpoint with random weights, for tests and timings"
    )
    tiny.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    tiny.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="FOLDER …",
        help="the folder, and sizes: see `tiny KIND -h`",
    )
    tiny.set_defaults(run=_write)


def _check(arguments: argparse.Namespace) -> int:
    """Prints the findings; returns the exit status."""
    from serve_app.cli.doctor import checkpoints  # imports much, which other commands do not need
    from serve_app.cli.doctor.findings import fault

    folder: Path = arguments.folder.expanduser().absolute()
    if not folder.is_dir():
        print(fault(f"{folder} is not a folder", "correct the path"))
        return 1
    is_flat = not (folder / "model_index.json").exists() and (folder / "config.json").exists()
    place = checkpoints.Place(folder.name, _Folder(str(folder)), built_in=(), flat=is_flat)
    findings = list(checkpoints.state(place))
    if arguments.hashes:
        findings += checkpoints.hashes(place)
    for finding in findings:
        print(finding)
    return 0 if all(finding.ok for finding in findings) else 1


def _write(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint. Its sizes are further options, so the kind's own parser reads the rest."""
    module = importlib.import_module(f"{KINDS[arguments.kind]}.tiny")
    module.CHECKPOINT.main(f"glm-image-server checkpoint tiny {arguments.kind}", arguments.rest)
