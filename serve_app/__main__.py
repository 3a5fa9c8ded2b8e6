"""The command line: `python -m serve_app serve FILE`, `keys new NAME`, `drain`.

`serve` is what `make serve` runs. It starts its own Ray, serves until Ctrl-C or SIGTERM, and stops every
process that it has started. On a Ray cluster, use Ray's `serve run` or `serve deploy` with the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serve_app.config import APIKey, AppConfig
from serve_app.home import ROOT
from serve_app.http.proxy import ENVIRONMENT
from serve_app.http.tls import self_signed

if TYPE_CHECKING:
    from ray.serve import Application


TLS_FOLDER = ROOT.expanduser() / "tls"


class _Application(BaseModel):
    """The keys of a Serve application that are supported. Any other key is an error."""

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
    """Runs the command that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m serve_app", description="A server for GLM-Image.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve a configuration on this machine until Ctrl-C"))
    _add_keys(commands.add_parser("keys", help="make API keys"))
    _add_drain(commands.add_parser("drain", help="let an application on a Ray cluster finish its requests"))
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a configuration on this machine until Ctrl-C."
    parser.add_argument("config", type=Path, help="a Serve config file, such as configs/demo.yaml")
    parser.add_argument("--host", help="address to listen on; overrides the file")
    parser.add_argument("--port", type=int, help="port to listen on; overrides the file")
    parser.add_argument(
        "--tls",
        action="store_true",
        help="serve by https, with the file's ssl_certfile and ssl_keyfile, or else with a certificate that "
        f"the server makes for the host, keeps in {TLS_FOLDER}, and renews before it expires",
    )
    parser.add_argument(
        "--metrics-port", type=int, help="port of the Prometheus metrics; by default a free one"
    )
    parser.set_defaults(run=partial(_serve_file, parser))


def _add_keys(parser: argparse.ArgumentParser) -> None:
    new = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="make a key; print it once, with its line for the configuration"
    )
    new.add_argument("name", help="id of the key in the configuration and in the log")
    new.set_defaults(run=partial(_new_key, new))


def _add_drain(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Let an application on a Ray cluster finish. It rejects new requests with a 503 from now on. The "
        "command returns when running requests have ended and running jobs are back in the queue. "
        "Run it before `serve shutdown`, which closes all connections at once."
    )
    parser.add_argument("--name", help="name of the application; by default the only one")
    parser.set_defaults(run=partial(_drain, parser))


def _new_key(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    secret = secrets.token_urlsafe(32)
    try:
        key = APIKey(id=arguments.name, sha256=hashlib.sha256(secret.encode()).hexdigest())
    except ValueError:
        parser.error("a name has 1 to 64 letters, digits, dots, underscores and hyphens")
    print(f"The key, which is not shown again:\n\n  {secret}\n")
    print("Under auth.api_keys of the configuration, or in the file auth.keys_file:\n")
    print(f"  - {{id: {key.id}, sha256: {key.sha256}}}")


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


def _serve_file(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """Serves a file until a signal; returns the problem, if there was one."""
    try:
        file = _ServeFile.model_validate(yaml.safe_load(arguments.config.read_text()))
        (application,) = file.applications
        http = file.http_options.model_copy(
            update={k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
        )
        if not is_local(http.host):
            application.args = closed(application.args)
        if arguments.tls and not http.ssl_certfile:
            certificate, key = self_signed(TLS_FOLDER, _reached_by(http.host))
            http = http.model_copy(update={"ssl_certfile": str(certificate), "ssl_keyfile": str(key)})
        if http.ssl_certfile:  # an unusable one would make the proxy restart endlessly
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                http.ssl_certfile, http.ssl_keyfile
            )
        app = _build(application)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        parser.error("\n".join([f"{arguments.config}:", *problems]))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{arguments.config}: {error}")
    # Ray would retry for minutes. Its metrics listen on all interfaces.
    for host, port in ((http.host, http.port), ("", arguments.metrics_port or 0)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, port), family=family).close()
        except (OSError, OverflowError) as error:
            parser.error(f"cannot listen on {host}:{port}: {error}")
    return _serve(application, app, http, arguments.metrics_port)


def is_local(host: str) -> bool:
    """Returns whether an address is reachable from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _reached_by(host: str) -> str:
    """Returns the name by which other machines may reach this one."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def closed(config: AppConfig) -> AppConfig:
    """Returns the configuration without `auth.open`.

    Raises:
        ValueError: there are no keys.
    """
    if not config.auth.has_keys:
        raise ValueError(
            "other machines reach that host, so auth.open is ignored, and there are no auth.api_keys; "
            "make one with `python -m serve_app keys new NAME`"
        )
    return config.model_copy(update={"auth": config.auth.model_copy(update={"open": False})})


def _build(application: _Application) -> Application:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
    os.environ.update(ENVIRONMENT)
    from serve_app.app import build_app  # after the setting; --help does not need it

    return build_app(application.args)


def _serve(
    application: _Application, app: Application, http: _HTTPOptions, metrics_port: int | None
) -> str | None:
    """Serves until a signal; returns the problem, if there was one."""
    import ray
    from ray import serve

    from serve_app.app import lacking_gpus

    stop = threading.Event()
    interruptible = False

    def on_signal(*_: object) -> None:
        stop.set()
        if interruptible:
            raise KeyboardInterrupt

    # An interrupted start of Ray would leave processes behind, so a signal waits for its end.
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    ray.init(address="local", include_dashboard=False, _metrics_export_port=metrics_port)
    signal.signal(signal.SIGTERM, on_signal)  # again: Ray has installed its own, which exits
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
            print("Stopping when running requests have ended. Ctrl-C again stops at once.", flush=True)
            serve.get_app_handle(application.name).broadcast("drain").results()
            # Answers may still be on their way. Unlike `serve.shutdown`, this leaves the proxy alone.
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
    """Returns the errors of the replicas, without Serve's tracebacks."""
    from ray import serve

    reasons = []
    for name, deployment in serve.status().applications[app_name].deployments.items():
        errors = [line for line in deployment.message.splitlines() if "Error: " in line]
        if errors:
            reasons.append(f"{name}: {errors[-1].strip()}")
    return "\n".join(["The server could not start.", *reasons]) if reasons else None


def _greet(http: _HTTPOptions, route_prefix: str, *, needs_key: bool) -> None:
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
    host = anywhere.get(http.host, http.host)
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
