"""The ports of a server on one machine are those of the security page, and Ray's ask for its token."""

import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import httpx
import psutil
import pytest

from tests.serve.conftest import ROOT, Running, config_file, served, tiny_model

PAGE = (ROOT / "docs/operate/security.md").read_text()
GRPC = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.serve.ASGIService/HandleRequest",
)
"""A method of each gRPC service of Ray."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("ports")
    with served(config_file(folder, [tiny_model("m", prior={"min_replicas": 1})])) as running:
        yield running


def listening(running: Running) -> Iterator[tuple[str, str, int]]:
    """The processes that listen, with their address and port."""
    for process in running.process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            name = process_name(process.cmdline())
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield name, connection.laddr.ip, connection.laddr.port


def process_name(command: list[str]) -> str:
    title = " ".join(command)
    if match := re.match(r"ray::(\w+)", title):
        return match[1]
    if "serve_app" in command:
        return "serve_app"
    if (program := Path(command[0]).name) in ("gcs_server", "raylet"):
        return program
    return "IDLE" if "_worker.py" in title else re.findall(r"(\w+\.py)\b", title)[0]


FIXED = {
    ("DashboardAgent", "127.0.0.1"),
    ("DashboardAgent", "the machine's"),
    ("dashboard.py", "all"),
    ("monitor.py", "all"),
}
"""Ports that are always the same. A second Ray on the machine goes without them."""


def address_name(address: str) -> str:
    """An address as the page names it."""
    parsed = ip_address(address)
    if parsed.is_unspecified:
        return "all"
    return "127.0.0.1" if parsed.is_loopback else "the machine's"


def test_every_port_is_on_the_security_page(running: Running) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (`http_options.host`|[^|]+) \|", PAGE, re.MULTILINE)
    listed = {(name, "127.0.0.1" if "host" in address else address) for name, address in rows}
    found = {(name, address_name(address)) for name, address, _ in listening(running)}
    assert found <= listed
    assert listed - found <= FIXED | {("IDLE", "all")}


def test_ray_answers_no_call_without_its_token(running: Running) -> None:
    answers: dict[str, set[str]] = {}
    for name, address, port in listening(running):
        if address_name(address) != "all":
            continue
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in GRPC:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", timeout=10)
                answers.setdefault(name, set()).add(caught.value.code().name)
    # Of what Ray ran, the code would be another one. A port for HTTP is unavailable for gRPC.
    assert set().union(*answers.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}
    rejecting = {name for name, codes in answers.items() if "UNAUTHENTICATED" in codes}
    assert rejecting - {"IDLE"} == answers.keys() - {"IDLE", "dashboard.py", "monitor.py"}


def test_without_the_token_http_gives_metrics_alone(running: Running) -> None:
    codes: dict[tuple[str, str], set[int]] = {}
    for name, address, port in listening(running):
        if name in ("DashboardAgent", "RuntimeEnvAgent", "dashboard.py", "monitor.py"):
            host = "127.0.0.1" if address_name(address) == "all" else address
            with suppress(httpx.HTTPError):  # gRPC
                answer = httpx.get(f"http://{host}:{port}/metrics", timeout=10)
                codes.setdefault((name, address_name(address)), set()).add(answer.status_code)
    for (name, address), found in codes.items():
        assert found == ({200} if address == "all" else {401}), (name, address)
    assert codes.keys() >= {("DashboardAgent", "all"), ("RuntimeEnvAgent", "the machine's")}
