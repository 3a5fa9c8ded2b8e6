"""Serve a configuration on this machine: `python -m serve_app configs/tiny.yaml`.

What `make serve` runs. It starts a Ray of its own, serves until Ctrl-C or SIGTERM, and leaves nothing
behind. On a Ray cluster use Ray's own `serve run` or `serve deploy` with the same file.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.config import AppConfig


class _Application(BaseModel):
    """What of a Serve application's keys is understood here; any other is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    name: str
    route_prefix: str = "/"
    import_path: str
    args: AppConfig


class _ServeFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    http_options: dict[str, Any] = {}
    applications: tuple[_Application]


def main() -> None:
    """Read the command line, serve, stop cleanly."""
    parser = argparse.ArgumentParser(
        prog="python -m serve_app", description="Serve a configuration on this machine until Ctrl-C."
    )
    parser.add_argument("config", type=Path, help="a Serve config file, such as configs/tiny.yaml")
    parser.add_argument("--host", help="address to listen on, instead of the file's")
    parser.add_argument("--port", type=int, help="port to listen on, instead of the file's")
    arguments = parser.parse_args()
    try:
        file = _ServeFile.model_validate(yaml.safe_load(arguments.config.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        parser.error(f"{arguments.config}: {error}")
    http_options = {"host": "127.0.0.1", "port": 8000} | file.http_options
    http_options |= {k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
    try:  # Ray would go on trying for minutes
        socket.create_server((http_options["host"], http_options["port"])).close()
    except OSError as error:
        parser.error(f"cannot listen on {http_options['host']}:{http_options['port']}: {error}")
    _serve(file.applications[0], http_options)


def _serve(application: _Application, http_options: dict[str, Any]) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
    import ray  # after the setting, and not for --help
    from ray import serve

    from serve_app.app import build_app

    stop = threading.Event()
    ray.init(address="local", include_dashboard=False)
    try:
        # From here on a signal means to stop cleanly, also in the middle of loading.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        serve.start(http_options=http_options)
        serve.run(build_app(application.args), name=application.name, route_prefix=application.route_prefix)
        _greet(http_options["host"], http_options["port"])
        stop.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        serve.shutdown()
        ray.shutdown()


def _greet(host: str, port: int) -> None:
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104 - compared, not bound
    body = '{"prompt": "a red boat at dawn", "size": "512x512", "num_inference_steps": 8}'
    print(
        f"\nServing on {address}. Make an image:\n\n"
        f"  curl {address}/v1/images/generations -H 'Content-Type: application/json' -d '{body}'\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
