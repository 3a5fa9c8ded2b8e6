"""Tests of the wheel's contents: the server with its data files, without trainer and tests."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.k8s.manifests import ROOT

EXPECTED = (
    "deployments/families/glm_image/demo/checkpoint/text_encoder/model.safetensors",
    "deployments/families/glm_image/demo/checkpoint/transformer/diffusion_pytorch_model.safetensors",
    "deployments/families/glm_image/demo/checkpoint/vae/diffusion_pytorch_model.safetensors",
    "deployments/families/glm_image/demo/checkpoint/vision_language_encoder/model.safetensors",
    "serve_app/jobs/migrations/versions/v0001_jobs.py",
    "serve_app/playground/index.html",
    "serve_app/playground/operator.html",
    "serve_app/playground/static/main.js",
    "serve_app/reference/index.html",
    "serve_app/reference/static/reference.js",
)


def copy_sources(target: Path) -> None:
    """Copies the repository's files without ignored ones, so that the build writes nothing into it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in map(Path, filter(None, listed.split("\0"))):
        if (ROOT / path).is_file():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, target / path)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths of the files in a wheel that pip builds, as it does for an installation."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(folder / "sources")
    command = [sys.executable, "-m", "pip", "wheel", str(folder / "sources"), "--wheel-dir", str(folder)]
    command += ["--no-deps", "--disable-pip-version-check"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_contains_no_trainer_and_no_tests(packaged: set[str]) -> None:
    assert (ROOT / "training").is_dir(), "the trainer has moved; change this test"
    assert [path for path in packaged if path.startswith(("training/", "tests/"))] == []
    folders = {path.partition("/")[0] for path in packaged}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"deployments", "serve_app"}


@pytest.mark.parametrize("path", EXPECTED)
def test_the_wheel_contains(packaged: set[str], path: str) -> None:
    assert path in packaged
