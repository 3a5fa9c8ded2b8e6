"""Serve a configuration on this machine: `python -m serve_app configs/demo.yaml`.

What `make serve` runs. It starts a Ray of its own, serves until Ctrl-C or SIGTERM, and leaves nothing
behind. On a Ray cluster use Ray's own `serve run` or `serve deploy` with the same file.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import ssl
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serve_app.config import AppConfig
from serve_app.tls import self_signed

if TYPE_CHECKING:
    from ray.serve import Application


TLS_FOLDER = Path.home() / ".local/share/glm-image-server/tls"


class _Application(BaseModel):
    """What of a Serve application's keys is understood here; any other is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    name: str
    route_prefix: str = "/"
    import_path: Literal["serve_app.app:build_app"]
    args: AppConfig


class _HTTPOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    port: int = 8000
    keep_alive_timeout_s: int = 90
    request_timeout_s: float | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("give both ssl_certfile and ssl_keyfile")
        return self


class _ServeFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    http_options: _HTTPOptions = _HTTPOptions()
    applications: tuple[_Application]


def main() -> None:
    """Read the command line, serve, stop cleanly."""
    parser = argparse.ArgumentParser(
        prog="python -m serve_app", description="Serve a configuration on this machine until Ctrl-C."
    )
    parser.add_argument("config", type=Path, help="a Serve config file, such as configs/demo.yaml")
    parser.add_argument("--host", help="address to listen on, instead of the file's")
    parser.add_argument("--port", type=int, help="port to listen on, instead of the file's")
    parser.add_argument(
        "--tls",
        action="store_true",
        help="serve by https, with the file's ssl_certfile and ssl_keyfile or, if it has none, with a "
        f"certificate that is made at the first start and kept in {TLS_FOLDER}",
    )
    parser.add_argument(
        "--metrics-port", type=int, help="port of the metrics for Prometheus; a free one if it is not given"
    )
    arguments = parser.parse_args()
    try:
        file = _ServeFile.model_validate(yaml.safe_load(arguments.config.read_text()))
        (application,) = file.applications
        http = file.http_options.model_copy(
            update={k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
        )
        if not _is_local(http.host):
            application.args = _closed(application.args)
        if arguments.tls and not http.ssl_certfile:
            certificate, key = self_signed(TLS_FOLDER, _reached_by(http.host))
            http = http.model_copy(update={"ssl_certfile": str(certificate), "ssl_keyfile": str(key)})
        if http.ssl_certfile:  # which the proxy would take for a reason to start again and again
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                http.ssl_certfile, http.ssl_keyfile
            )
        app = _build(application)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        parser.error("\n".join([f"{arguments.config}:", *problems]))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{arguments.config}: {error}")
    # Ray would go on trying for minutes, and its metrics are on all interfaces.
    for host, port in ((http.host, http.port), ("", arguments.metrics_port or 0)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, port), family=family).close()
        except (OSError, OverflowError) as error:
            parser.error(f"cannot listen on {host}:{port}: {error}")
    sys.exit(_serve(application, app, http, arguments.metrics_port))


def _is_local(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _reached_by(host: str) -> str:
    """What other machines, if they reach the server, may call this one."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def _closed(config: AppConfig) -> AppConfig:
    """The configuration for those who have a key only.

    Raises:
        ValueError: there are no keys.
    """
    if not config.auth.api_keys:
        raise ValueError(
            "other machines reach that host, so auth.open does not hold, and there are no auth.api_keys; "
            "make one with `python -m serve_app.auth new NAME`"
        )
    return config.model_copy(update={"auth": config.auth.model_copy(update={"open": False})})


def _build(application: _Application) -> Application:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
    from serve_app.app import build_app  # after the setting, and not for --help

    return build_app(application.args)


def _serve(
    application: _Application, app: Application, http: _HTTPOptions, metrics_port: int | None
) -> str | None:
    """Serve until a signal; returns what went wrong, for people."""
    import ray
    from ray import serve

    from serve_app.app import lacking_gpus

    stop = threading.Event()
    interruptible = False

    def on_signal(*_: object) -> None:
        stop.set()
        if interruptible:
            raise KeyboardInterrupt

    # Ray's start, cut short, would leave processes behind: a signal waits for its end.
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    ray.init(address="local", include_dashboard=False, _metrics_export_port=metrics_port)
    signal.signal(signal.SIGTERM, on_signal)  # again: Ray has put its own there, which exits
    try:
        interruptible = True
        if stop.is_set():
            return None
        if problem := lacking_gpus(application.args):
            return problem
        serve.start(http_options=http.model_dump())
        try:
            serve.run(app, name=application.name, route_prefix=application.route_prefix)
        except RuntimeError as error:
            return _why_not(application.name) or str(error)
        _greet(http, application.route_prefix, needs_key=not application.args.auth.open)
        (node,) = ray.nodes()
        port = node["MetricsExportPort"]
        print(f"Metrics for Prometheus: http://{node['NodeManagerAddress']}:{port}/metrics\n", flush=True)
        try:
            stop.wait()
        except KeyboardInterrupt:
            print("Stopping when running requests have ended; Ctrl-C again stops at once.", flush=True)
            serve.get_app_handle(application.name).broadcast("drain").results()
            # What has ended may be on its way still: unlike `serve.shutdown` this leaves the proxy alone.
            serve.delete(application.name)
    except KeyboardInterrupt:
        pass
    finally:
        interruptible = False
        print("Stopping.", flush=True)
        ray.shutdown()
        print("Stopped.", flush=True)
    return None


def _why_not(app_name: str) -> str | None:
    """The replicas' own words, which Serve wraps into tracebacks."""
    from ray import serve

    reasons = []
    for name, deployment in serve.status().applications[app_name].deployments.items():
        errors = [line for line in deployment.message.splitlines() if "Error: " in line]
        if errors:
            reasons.append(f"{name}: {errors[-1].strip()}")
    return "\n".join(["The server could not start.", *reasons]) if reasons else None


def _greet(http: _HTTPOptions, route_prefix: str, *, needs_key: bool) -> None:
    host = "127.0.0.1" if http.host == "0.0.0.0" else http.host  # noqa: S104 - compared, not bound
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if http.ssl_certfile else "http"
    address = f"{scheme}://{host}:{http.port}{route_prefix.rstrip('/')}"
    prompt = "a small red star above a blue circle on a yellow background"
    body = f'{{"prompt": "{prompt}", "size": "512x512", "num_inference_steps": 8}}'
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    trust = f" --cacert {http.ssl_certfile}" if http.ssl_certfile else ""
    print(
        f"\nServing on {address}. Open {address}/ in a browser, or make an image:\n\n"
        f"  curl{trust} {address}/v1/images/generations{key} -H 'Content-Type: application/json' "
        f"-d '{body}'\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
