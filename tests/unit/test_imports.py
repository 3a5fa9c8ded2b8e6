"""The planes stay apart: `deployments` does not import `serve_app`, and `serve_app` loads no torch.

Only some folders of `serve_app` know HTTP, and only one module opens connections.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.families import FAMILIES

ROOT = Path(__file__).parents[2]
CLIENTS = {"aiohttp", "ftplib", "http.client", "httpx", "requests", "smtplib", "urllib.request", "urllib3"}
CONNECTING = {"connect", "connect_ex", "create_connection", "open_connection", "sock_connect"}


def imported_names(file: Path) -> set[str]:
    """Returns the imported modules, and the names imported from modules as `module.name`.

    Imports for annotations only are included.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def imported_packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(file)}


def opens_connections(file: Path) -> bool:
    names = imported_names(file)
    nodes = ast.walk(ast.parse(file.read_text()))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {name.rpartition(".")[2] for name in names}
    return bool(used & CONNECTING) or any(
        f"{name}.".startswith(f"{client}.") for name in names for client in CLIENTS
    )


def test_the_model_plane_imports_neither_the_api_plane_nor_http() -> None:
    files = sorted((ROOT / "deployments").rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & {"serve_app", "fastapi", "starlette"}, file


@pytest.mark.parametrize("package", ["engines", "families", "helpers"])
def test_engines_import_no_ray(package: str) -> None:
    files = sorted((ROOT / "deployments" / package).rglob("*.py"))
    assert files
    for file in files:
        assert "ray" not in imported_packages(file), file


@pytest.mark.parametrize("package", ["generation", "jobs", "files", "cluster"])
def test_the_makers_of_images_and_jobs_know_no_http(package: str) -> None:
    files = sorted((ROOT / "serve_app" / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & {"fastapi", "starlette"}, file
        assert not any(name.startswith("serve_app.http") for name in imported_names(file)), file


WEB = {"fastapi", "starlette"}
MAY_KNOW_HTTP = ("http/", "dialects/", "playground/", "reference/", "app.py")


def test_only_the_http_side_of_the_api_plane_imports_a_web_framework() -> None:
    folder = ROOT / "serve_app"
    importing = {
        str(file.relative_to(folder)): {
            name for name in imported_names(file) if name.partition(".")[0] in WEB
        }
        for file in sorted(folder.rglob("*.py"))
    }
    assert importing["http/application.py"]
    elsewhere = {name: found for name, found in importing.items() if not name.startswith(MAY_KNOW_HTTP)}
    telemetry = elsewhere.pop("observability/telemetry.py")
    assert all(name.startswith("starlette.types.") for name in telemetry), "types of its middleware only"
    assert {name: found for name, found in elsewhere.items() if found} == {}


def test_the_server_imports_no_trainer() -> None:
    for plane in ("deployments", "serve_app"):
        for file in (ROOT / plane).rglob("*.py"):
            assert "training" not in imported_packages(file), file


def test_the_api_plane_loads_no_torch() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "serve_app").rglob("*.py")
        if file.name != "__init__.py" and "migrations" not in file.parts  # only Alembic runs them
    ]
    assert "serve_app.app" in modules
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


def test_one_module_opens_connections() -> None:
    files = sorted((ROOT / "serve_app").rglob("*.py"))
    assert [file.name for file in files if opens_connections(file)] == ["outbound.py"]


@pytest.mark.parametrize(
    "program",
    [
        "import aiohttp",
        "import urllib.request as r",
        "from urllib import request",
        "from urllib.request import urlopen",
        "from http.client import HTTPConnection",
        "def get():\n    from httpx import Client",
        "import socket\nsocket.create_connection(('h', 80))",
        "from socket import create_connection",
        "import asyncio\nasyncio.open_connection('h', 80)",
        "loop.create_connection(make, 'h', 80)",
    ],
)
def test_another_way_to_open_a_connection_would_be_found(tmp_path: Path, program: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(program)
    assert opens_connections(file)


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_a_familys_folder_only_one_map_names_it(name: str) -> None:
    """Apps and routes of hosted APIs are called `glm-image`, which is not the name of a family."""
    naming = {
        str(file.relative_to(ROOT))
        for plane in ("deployments", "serve_app")
        for file in (ROOT / plane).rglob("*.py")
        if name in file.read_text() and name not in file.relative_to(ROOT).parts
    }
    assert naming == {"deployments/families/__init__.py"}
