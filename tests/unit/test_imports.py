"""The planes stay apart: `deployments` knows nothing of `serve_app`, and `serve_app` loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_model_plane_imports_neither_the_api_plane_nor_http() -> None:
    files = sorted((ROOT / "deployments").rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & {"serve_app", "fastapi", "starlette"}, file


def test_engines_import_no_ray() -> None:
    files = sorted((ROOT / "deployments" / "glm_image").glob("*.py"))
    assert files
    for file in files:
        assert "ray" not in imported_packages(file), file


def test_the_api_plane_loads_no_torch() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "serve_app").rglob("*.py")
        if file.name != "__init__.py"
    ]
    assert "serve_app.app" in modules
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0
