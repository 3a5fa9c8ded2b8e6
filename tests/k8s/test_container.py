"""Dockerfile, .dockerignore and compose.yaml, as far as they can be checked where no container engine is."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.k8s.container import (
    Compose,
    check_compose,
    check_dockerfile,
    is_ignored,
    last_stage,
    lint,
    patterns,
)
from tests.k8s.manifests import PACKAGES, ROOT
from tests.k8s.serving import locked

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DOCKERIGNORE = (ROOT / ".dockerignore").read_text()
COMPOSE: Compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
needs_packages = pytest.mark.skipif(
    not PACKAGES.exists(), reason="needs the packages of tests/k8s (Debian: nodejs and npm)"
)


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    assert lint(ROOT / "Dockerfile") == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.replace(" --no-cache-dir", ""))
    assert "DL3042" in lint(worse)


def test_the_image_has_what_it_needs() -> None:
    assert check_dockerfile(DOCKERFILE, DOCKERIGNORE) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("USER 1000\n", "", "it runs as root"),
        ("USER 1000\n", "USER root\n", "it runs as root"),
        ("USER 1000\n", "USER 0\n", "it runs as root"),
        ("g++ wget", "g++", "KubeRay's probes need wget"),
        ("COPY serve_app serve_app", "COPY server server", "there is no server"),
        ("COPY serve_app serve_app\n", "", "the image lacks serve_app"),
        ("COPY configs configs", "COPY k8s k8s\nCOPY configs configs", ".dockerignore keeps k8s out"),
        ("http://127.0.0.1:8000/livez", "http://127.0.0.1:8000/", "it has no HEALTHCHECK of /livez"),
        ('image.version="0.1.0"', 'image.version="0.0.1"', "its label is not of version"),
        ("--requirement /tmp/requirements.lock", "ray", "it is not installed from the lock"),
        ("configs/demo.yaml", "configs/none.yaml", "there is no configs/none.yaml"),
        ('"-m", "serve_app"', '"-m", "serve"', "is not the server"),
        ('"configs/demo.yaml"]', '"configs/demo.yaml", "--listen", "x"]', "no option --listen"),
        ("FROM python:", "FROM example.com/python:", "an image of somebody's own"),
        ("-t glm-image-server:0.1.0-ray2.60.0 ", "-t glm-image-server:0.1.0-ray2.59.0 ", "2.59.0"),
        ("WORKDIR /app", "WORKDIR /app\nENV HF_TOKEN=abc", "a secret would stay in the image"),
        ("COPY LICENSE", "ADD LICENSE", "COPY says what comes in"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_caught(old: str, new: str, told: str) -> None:
    assert old in DOCKERFILE
    found = check_dockerfile(DOCKERFILE.replace(old, new), DOCKERIGNORE)
    assert any(told in problem for problem in found), found


def test_a_mistake_in_what_is_ignored_is_caught() -> None:
    assert check_dockerfile(DOCKERFILE, DOCKERIGNORE.replace("!deployments\n", ""))
    found = check_dockerfile(DOCKERFILE, DOCKERIGNORE.replace("*\n", "", 1))
    assert "README.md would be in the image" in found
    assert "tests/k8s/container.py would be in the image" in found


def test_what_is_ignored_is_what_docker_ignores() -> None:
    rules = patterns("*\n!keep\n**/__pycache__\nkeep/not.yaml\n!a/*.yaml")
    assert not is_ignored("keep/this/file.py", rules)
    assert not is_ignored("a/b.yaml", rules)
    assert is_ignored("keep/__pycache__/file.pyc", rules)
    assert is_ignored("keep/not.yaml", rules)
    assert is_ignored("other/file", rules)


def test_the_python_is_that_of_the_lock() -> None:
    (version,) = re.findall(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.MULTILINE)
    (least,) = re.findall(
        r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version == least


def test_pytorch_is_taken_of_the_version_of_the_lock() -> None:
    assert re.search(r"^torch==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked("torch")
    assert "grep -o '^torch==[^ ]*' /tmp/requirements.lock" in DOCKERFILE


def test_no_weights_and_no_secrets_come_in() -> None:
    for name, rest in last_stage(DOCKERFILE):
        assert not re.search(r"\bhf\b|download|\.safetensors", rest), name
    assert "secrets/" in (ROOT / ".gitignore").read_text()


@needs_packages
def test_compose_starts_what_fits_together() -> None:
    assert check_compose(COMPOSE) == []


MISTAKES: dict[str, tuple[Callable[[Compose], object], str]] = {
    "a misspelt key": (lambda c: c["services"]["server"].update(imag="a"), "'imag'"),
    "a wrong type": (lambda c: c["services"]["server"].update(init="perhaps"), "is not of type"),
    "a port for everybody": (
        lambda c: c["services"]["server"]["ports"].append("8000:8000"),
        "everybody reaches",
    ),
    "the database for everybody": (
        lambda c: c["services"]["database"].update(ports=["5432:5432"]),
        "everybody",
    ),
    "a password in the clear": (
        lambda c: c["services"]["database"]["environment"].update({"POSTGRES_PASSWORD": "abc"}),
        "POSTGRES_PASSWORD stands there in the clear",
    ),
    "a secret from nowhere": (lambda c: c["secrets"].pop("api_key"), "the secret api_key comes from no file"),
    "weights to be written to": (
        lambda c: c["services"]["server"]["volumes"][0].update(read_only=False),
        "/models is mounted to be written to",
    ),
    "an image of another Ray": (
        lambda c: c["services"]["server"].update(image="glm-image-server:0.1.0-ray2.59.0"),
        "is not that of the lock",
    ),
    "a database of any version": (
        lambda c: c["services"]["database"].update(image="postgres"),
        "certain version",
    ),
    "no health check": (
        lambda c: c["services"]["database"].pop("healthcheck"),
        "nobody knows whether it is there",
    ),
    "a server that does not wait": (
        lambda c: c["services"]["server"].update(depends_on=["database"]),
        "it does not wait",
    ),
    "escalation of privileges": (
        lambda c: c["services"]["server"].pop("security_opt"),
        "may escalate its privileges",
    ),
    "a volume that there is not": (lambda c: c["volumes"].pop("files"), "there is no volume files"),
    "an unknown option": (lambda c: change(c, "--host", "--listen"), "no option --listen"),
    "a configuration that there is not": (
        lambda c: change(c, "workstation", "none"),
        "there is no configs/none.yaml",
    ),
    "an open configuration": (lambda c: change(c, "workstation", "two-gpus"), "it needs no key"),
    "a key that nobody sets": (lambda c: change(c, "GLM_IMAGE_KEY", "KEY"), "nobody sets GLM_IMAGE_KEY"),
    "too few GPUs": (
        lambda c: c["services"]["server"]["deploy"]["resources"]["reservations"]["devices"][0].update(
            count=1
        ),
        "it has 1 GPUs",
    ),
    "another database": (
        lambda c: c["services"]["database"]["environment"].update(POSTGRES_DB="images"),
        "its database is",
    ),
    "a stop in the middle of requests": (
        lambda c: c["services"]["server"].update(stop_grace_period="60s"),
        "too short for running requests",
    ),
    "metrics that nobody reaches": (lambda c: change(c, "9100", "9101"), "nobody reaches its metrics"),
    "a server that nobody reaches": (lambda c: change(c, "--host 0.0.0.0", ""), "outside of the container"),
}


def change(compose: Compose, old: str, new: str) -> None:
    command = compose["services"]["server"]["command"]
    assert old in command[-1]
    command[-1] = command[-1].replace(old, new)


@needs_packages
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_compose_is_caught(mistake: str) -> None:
    plant, told = MISTAKES[mistake]
    compose = copy.deepcopy(COMPOSE)
    plant(compose)
    found = check_compose(compose)
    assert any(told in problem for problem in found), found
