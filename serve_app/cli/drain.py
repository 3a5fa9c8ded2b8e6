"""The command `drain`: lets an application on a Ray cluster finish its requests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

HELP = "let an application on a Ray cluster finish its requests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
    parser.description = (
        "Let an application on a Ray cluster finish. It rejects new requests with a 503 from now on. The "
        "command returns when running requests have ended and running jobs are back in the queue. "
        "Run it before `serve shutdown`, which closes all connections at once."
    )
    parser.add_argument("--name", help="name of the application; by default the only one")
    parser.set_defaults(run=partial(_drain, parser))


def _drain(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        ray.init(address="auto", log_to_driver=False)
        names = [arguments.name] if arguments.name else list(serve.status().applications)
        if len(names) != 1:
            parser.error(f"name one application with --name; there are: {', '.join(names) or 'none'}")
        handle = serve.get_app_handle(names[0])
    except (ConnectionError, RayServeException) as error:
        parser.error(str(error))
    handle.broadcast("drain").results()
