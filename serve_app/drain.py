"""Let an application on a Ray cluster finish what it has begun: `python -m serve_app.drain`.

Requests end, and new ones get a 503 from then on, for good. Jobs that run go back into the queue, where the
next server finds them. For use before `serve shutdown`, which ends Ray's proxies at once and with them all
connections.
"""

from __future__ import annotations

import argparse

import ray
from ray import serve
from ray.serve.exceptions import RayServeException


def main() -> None:
    """Read the command line, drain, return when nothing runs any more."""
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.drain",
        description="Have an application take no more requests, and return when the running ones have ended.",
    )
    parser.add_argument("--name", default="glm-image", help="of the application; glm-image if not given")
    name = parser.parse_args().name
    try:
        ray.init(address="auto", log_to_driver=False)
        handle = serve.get_app_handle(name)
    except (ConnectionError, RayServeException) as error:
        parser.error(str(error))
    handle.broadcast("drain").results()


if __name__ == "__main__":
    main()
