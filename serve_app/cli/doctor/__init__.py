"""The command `doctor`: checks this machine and a configuration. It starts and downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

HELP = "check this machine and a configuration, and say what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
    parser.description = (
        "Check this machine and, with FILE, what that configuration needs here. Each item is one line: "
        "`ok`, or `!!` with what to do. The exit status is 1 if there is a `!!`. "
        "The command starts and downloads nothing, and shows no secrets."
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="FILE", help="a Serve config file, such as configs/demo.yaml"
    )
    parser.add_argument(
        "--hashes",
        action="store_true",
        help="read all weights, and compare them with the SHA-256 of their download; takes minutes",
    )
    parser.set_defaults(run=_examine)


def _examine(arguments: argparse.Namespace) -> int:
    """Prints the findings; returns the exit status."""
    from serve_app.cli.doctor.examination import examine  # imports much, which other commands do not need

    status = 0
    for finding in examine(arguments.config, hashes=arguments.hashes):
        print(finding, flush=True)
        status = status if finding.ok else 1
    return status
