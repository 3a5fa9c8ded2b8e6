"""The command line: `glm-image-server COMMAND`, or `python -m serve_app COMMAND`.

Each command is a module of this package. It has a line of help, `HELP`, and `add_arguments`, which fills the
command's parser and sets the function that runs it.
"""

from __future__ import annotations

import argparse
import sys

from serve_app import __version__
from serve_app.cli import check, checkpoint, doctor, drain, keys, serve

COMMANDS = {
    "serve": serve,
    "check": check,
    "doctor": doctor,
    "keys": keys,
    "drain": drain,
    "checkpoint": checkpoint,
}


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="glm-image-server", description="An image-generation server for GLM-Image and Z-Image."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser


def main() -> None:
    """Runs the command that the command line names."""
    arguments = command_line().parse_args()
    sys.exit(arguments.run(arguments))
