"""The command `keys new NAME`: makes an API key."""

from __future__ import annotations

import hashlib
import secrets
from functools import partial
from typing import TYPE_CHECKING, get_args

from serve_app.config import APIKey, Role

if TYPE_CHECKING:
    import argparse

HELP = "make API keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
    new = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="make a key; print it once, with its line for the configuration"
    )
    new.add_argument("name", help="id of the key in the configuration and in the log")
    new.add_argument("--role", choices=get_args(Role), default="user", help="role of the key (default: user)")
    new.set_defaults(run=partial(_new, new))


def _new(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    secret = secrets.token_urlsafe(32)
    try:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        key = APIKey(id=arguments.name, sha256=digest, role=arguments.role)
    except ValueError:
        parser.error("a name has 1 to 64 letters, digits, dots, underscores and hyphens")
    print(f"The key, which is not shown again:\n\n  {secret}\n")
    print("Under auth.api_keys of the configuration, or in the file auth.keys_file:\n")
    role = "" if key.role == "user" else f", role: {key.role}"
    print(f"  - {{id: {key.id}, sha256: {key.sha256}{role}}}")
