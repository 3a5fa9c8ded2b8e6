"""The command `serve FILE`, which `make serve` runs.

It starts its own Ray, serves until Ctrl-C or SIGTERM, and stops every process that it has started. On a Ray
cluster, use Ray's `serve run` or `serve deploy` with the same file.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.observability.console import Console
from serve_app import __version__
from serve_app.cli import config_file, gpus, ports
from serve_app.home import ROOT
from serve_app.http.proxy import ENVIRONMENT
from serve_app.http.tls import self_signed

if TYPE_CHECKING:
    import argparse

    from ray.serve import Application

    from serve_app.cli.config_file import HTTPOptions, ServeApplication
    from serve_app.config import AppConfig

HELP = "serve a configuration on this machine until Ctrl-C"
TLS_FOLDER = ROOT.expanduser() / "tls"
PATIENCE_S = 40
"""Seconds of a start after which the terminal shows what it waits for."""
POLL_INTERVAL_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fills the command's parser."""
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
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the log of Ray and of all its processes"
    )
    parser.set_defaults(run=partial(_serve_file, parser))


def _serve_file(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """Serves a file until a signal; returns the problem, if there was one."""
    path = arguments.config
    try:
        file, warnings = config_file.read(path)
    except config_file.ConfigFileError as error:
        parser.error(f"{path}:\n{error}")
    application = file.application
    http = file.http_options.model_copy(
        update={k: v for k in ("host", "port") if (v := getattr(arguments, k)) is not None}
    )
    print(f"GLM-Image server {__version__} starts with {path}.", flush=True)
    for warning in warnings:
        print(f"WARNING {path}: {warning}", file=sys.stderr)
    try:
        if not is_local(http.host):
            application.args = closed(application.args)
        if arguments.tls and not http.ssl_certfile:
            certificate, key = self_signed(TLS_FOLDER, _reached_by(http.host))
            http = http.model_copy(update={"ssl_certfile": str(certificate), "ssl_keyfile": str(key)})
        if http.ssl_certfile:  # an unusable one would make the proxy restart endlessly
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                http.ssl_certfile, http.ssl_keyfile
            )
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    present = gpus.visible()
    if present is not None and (problem := application.args.lacks_gpus(len(present))):
        parser.error(f"{path}: {problem}")
    # Ray would retry for minutes. Its metrics listen on all interfaces.
    for host, port in ((http.host, http.port), ("", arguments.metrics_port or 0)):
        if problem := ports.problem(host, port):
            parser.error(problem)
    with tempfile.TemporaryDirectory(prefix="glm-image-") as folder:
        if not arguments.verbose:
            Console(Path(folder))
        try:
            app = _build(application, verbose=arguments.verbose)
        except (TypeError, ValueError) as error:  # options of a deployment, which only Serve knows
            parser.error(f"{path}: {error}")
        return _serve(application, app, http, arguments)


def is_local(host: str) -> bool:
    """Returns whether an address is reachable from this machine only."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _reached_by(host: str) -> str:
    """Returns the name by which other machines may reach this one."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def closed(config: AppConfig) -> AppConfig:
    """Returns the configuration without `auth.open`, and without `wake_on_open`, which needs it.

    Raises:
        ValueError: there are no keys.
    """
    if not config.auth.has_keys:
        raise ValueError(
            "other machines reach that host, so auth.open is ignored, and there are no auth.api_keys; "
            "make one with `python -m serve_app keys new NAME`"
        )
    auth = config.auth.model_copy(update={"open": False})
    return config.model_copy(update={"auth": auth, "wake_on_open": False})


def _build(application: ServeApplication, *, verbose: bool) -> Application:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless told not to
    os.environ.update(ENVIRONMENT)
    from serve_app.app import build_app  # after the settings; --help does not need it

    if not verbose:  # Ray's files have all lines
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return build_app(application.args)


def _serve(
    application: ServeApplication, app: Application, http: HTTPOptions, arguments: argparse.Namespace
) -> str | None:
    """Serves until a signal; returns the problem, if there was one."""
    import ray
    from ray import serve

    stop = threading.Event()
    interruptible = False

    def on_signal(*_: object) -> None:
        stop.set()
        if interruptible:
            raise KeyboardInterrupt

    # An interrupted start of Ray would leave processes behind, so a signal waits for its end.
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=_follow_make, args=(stop,), daemon=True).start()
    context: Any = ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=arguments.verbose,
        logging_level=logging.INFO if arguments.verbose else logging.ERROR,
        _metrics_export_port=arguments.metrics_port,
    )
    signal.signal(signal.SIGTERM, on_signal)  # again: Ray has installed its own, which exits
    is_ready = threading.Event()
    try:
        interruptible = True
        if stop.is_set():
            return None
        if problem := application.args.lacks_gpus(ray.cluster_resources().get("GPU", 0)):
            return problem
        serve.start(http_options=http.model_dump())
        threading.Thread(target=_show_waiting, args=(application.name, is_ready), daemon=True).start()
        try:
            serve.run(app, name=application.name, route_prefix=application.route_prefix)
        except RuntimeError as error:
            return _why_not(application.name) or str(error)
        is_ready.set()
        _greet(http, application, Path(context.address_info["session_dir"], "logs"))
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
        is_ready.set()
        print("Stopping.", flush=True)
        ray.shutdown()
        print("Stopped.", flush=True)
    return None


def _follow_make(stop: threading.Event) -> None:
    """Interrupts the server when `make`, its parent, is interrupted alone.

    A terminal's Ctrl-C reaches both. A SIGINT to make's process does not reach its child: make blocks the
    signal and waits for the child to end.
    """
    parent = Path("/proc", str(os.getppid()))
    with suppress(OSError):
        if parent.joinpath("comm").read_text() != "make\n":
            return
        while not _blocks_interrupts(parent):
            if stop.wait(POLL_INTERVAL_S):
                return
        if not stop.wait(POLL_INTERVAL_S):  # a Ctrl-C has arrived by now
            os.kill(os.getpid(), signal.SIGINT)


def _blocks_interrupts(process: Path) -> bool:
    fields = dict(line.split(":\t", 1) for line in process.joinpath("status").read_text().splitlines())
    return bool(int(fields["SigBlk"], 16) >> (signal.SIGINT - 1) & 1)


def _show_waiting(app_name: str, is_ready: threading.Event) -> None:
    """Prints what the start waits for, whenever it waits long and that has changed."""
    from ray import serve

    shown = ""
    while not is_ready.wait(PATIENCE_S):
        deployments = serve.status().applications[app_name].deployments.items()
        # Serve's message about a long load advises to look for a slow constructor.
        waiting = [
            f"{name} is loading." if "to initialize" in one.message else f"{name}: {one.message}"
            for name, one in deployments
            if one.message
        ]
        if (text := "\n".join(["Still starting.", *waiting])) != shown:
            shown = text
            print(text, flush=True)


def _why_not(app_name: str) -> str | None:
    """Returns the errors of the replicas, without Serve's tracebacks."""
    from ray import serve

    reasons = []
    for name, deployment in serve.status().applications[app_name].deployments.items():
        errors = [line for line in deployment.message.splitlines() if "Error: " in line]
        if errors:
            reasons.append(f"{name}: {errors[-1].strip()}")
    return "\n".join(["The server could not start.", *reasons]) if reasons else None


def _greet(http: HTTPOptions, application: ServeApplication, logs: Path) -> None:
    import ray

    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
    host = anywhere.get(http.host, http.host)
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if http.ssl_certfile else "http"
    address = f"{scheme}://{host}:{http.port}{application.route_prefix.rstrip('/')}"
    prompt = "a small red star above a blue circle on a yellow background"
    body = f'{{"prompt": "{prompt}", "size": "512x512", "num_inference_steps": 8}}'
    key = "" if application.args.auth.open else " -H 'Authorization: Bearer KEY'"
    trust = f" --cacert {http.ssl_certfile}" if http.ssl_certfile else ""
    reach = "for this machine only" if is_local(http.host) else "for other machines too, with a key"
    (node,) = ray.nodes()
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = (
        f"Serving on {address}, {reach}. Ctrl-C stops it.",
        f"Playground in a browser: {address}/. An image from the shell:",
        f"  curl{trust} {address}/v1/images/generations{key} -H 'Content-Type: application/json' -d '{body}'",
        f"Logs: {logs}",
        f"Metrics for Prometheus: {metrics}",
    )
    print("\n".join(lines), flush=True)
