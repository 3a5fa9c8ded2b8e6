"""Tests of Dockerfile, .dockerignore and compose.yaml that need no container engine."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.k8s.container import (
    Compose,
    at,
    check_compose,
    check_dockerfile,
    instructions,
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


def test_hadolint_reports_no_problem(tmp_path: Path) -> None:
    assert lint(ROOT / "Dockerfile") == ""
    changed = tmp_path / "Dockerfile"
    changed.write_text(DOCKERFILE.replace(" --no-cache-dir", ""))
    assert "DL3042" in lint(changed)


def test_the_dockerfile_passes_its_checks() -> None:
    assert check_dockerfile(DOCKERFILE, DOCKERIGNORE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("USER 1000\n", "", "it runs as root"),
        ("USER 1000\n", "USER root\n", "it runs as root"),
        ("USER 1000\n", "USER 0\n", "it runs as root"),
        ("g++ wget", "g++", "KubeRay's probes need wget"),
        ("COPY serve_app serve_app", "COPY server server", "server does not exist"),
        ("COPY serve_app serve_app\n", "", "the image lacks serve_app"),
        ("COPY configs configs", "COPY k8s k8s\nCOPY configs configs", ".dockerignore excludes k8s"),
        ("http://127.0.0.1:8000/livez", "http://127.0.0.1:8000/", "its HEALTHCHECK does not request /livez"),
        ('image.version="0.2.0"', 'image.version="0.0.1"', "its label image.version is not"),
        ("--requirement /tmp/requirements.lock", "ray", "not installed from requirements.lock"),
        ("configs/demo.yaml", "configs/none.yaml", "configs/none.yaml does not exist"),
        ('"-m", "serve_app"', '"-m", "serve"', "does not start the server"),
        ('"configs/demo.yaml"]', '"configs/demo.yaml", "--listen", "x"]', "the option --listen"),
        ("FROM python:", "FROM example.com/python:", "only official base images"),
        ("-t glm-image-server:0.2.0-ray2.60.0 ", "-t glm-image-server:0.2.0-ray2.59.0 ", "2.59.0"),
        ("WORKDIR /app", "WORKDIR /app\nENV HF_TOKEN=abc", "the image would contain a secret"),
        ("COPY LICENSE", "ADD LICENSE", "use COPY"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_caught(old: str, new: str, problem: str) -> None:
    assert old in DOCKERFILE
    found = check_dockerfile(DOCKERFILE.replace(old, new), DOCKERIGNORE)
    assert any(problem in one for one in found), found


def test_a_mistake_in_dockerignore_is_caught() -> None:
    assert check_dockerfile(DOCKERFILE, DOCKERIGNORE.replace("!deployments\n", ""))
    found = check_dockerfile(DOCKERFILE, DOCKERIGNORE.replace("*\n", "", 1))
    for file in ("README.md", "tests/k8s/container.py", "training/__init__.py"):
        assert any(problem.startswith(f"{file} would be sent") for problem in found), file


def test_patterns_match_as_in_docker() -> None:
    rules = patterns("*\n!keep\n**/__pycache__\nkeep/not.yaml\n!a/*.yaml")
    assert not is_ignored("keep/this/file.py", rules)
    assert not is_ignored("a/b.yaml", rules)
    assert is_ignored("keep/__pycache__/file.pyc", rules)
    assert is_ignored("keep/not.yaml", rules)
    assert is_ignored("other/file", rules)


def test_the_python_version_is_the_oldest_supported_one() -> None:
    (version,) = re.findall(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.MULTILINE)
    (least,) = re.findall(
        r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert version == least


def test_pytorch_has_the_version_of_the_lock() -> None:
    assert re.search(r"^torch==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked("torch")
    assert "grep -o '^torch==[^ ]*' /tmp/requirements.lock" in DOCKERFILE


def test_the_image_contains_no_weights_and_no_secrets() -> None:
    for name, rest in last_stage(DOCKERFILE):
        assert not re.search(r"\bhf\b|download|\.safetensors", rest), name
    assert "secrets/" in (ROOT / ".gitignore").read_text()


def test_the_image_contains_no_trainer() -> None:
    ignored = patterns(DOCKERIGNORE)
    assert at("training"), "the trainer has moved; change this test"
    assert [file for file in at("training") if not is_ignored(file, ignored)] == []
    for name, rest in instructions(DOCKERFILE):
        if name == "COPY" and "--from=" not in rest:
            copied = {file for source in rest.split()[:-1] for file in at(source)}
            assert not [file for file in copied if file.startswith("training/")], rest


@needs_packages
def test_compose_passes_its_checks() -> None:
    assert check_compose(COMPOSE) == []


MISTAKES: dict[str, tuple[Callable[[Compose], object], str]] = {
    "a misspelt key": (lambda c: c["services"]["server"].update(imag="a"), "'imag'"),
    "a wrong type": (lambda c: c["services"]["server"].update(init="perhaps"), "is not of type"),
    "a port open to the network": (
        lambda c: c["services"]["server"]["ports"].append("8000:8000"),
        "8000:8000 is open to the network",
    ),
    "a database open to the network": (
        lambda c: c["services"]["database"].update(ports=["5432:5432"]),
        "is open to the network",
    ),
    "a password in the clear": (
        lambda c: c["services"]["database"]["environment"].update({"POSTGRES_PASSWORD": "abc"}),
        "POSTGRES_PASSWORD is in plain text",
    ),
    "a secret from nowhere": (lambda c: c["secrets"].pop("api_key"), "api_key is not read from a file"),
    "writable weights": (
        lambda c: c["services"]["server"]["volumes"][0].update(read_only=False),
        "/models is not mounted read-only",
    ),
    "an image of another Ray": (
        lambda c: c["services"]["server"].update(image="glm-image-server:0.2.0-ray2.59.0"),
        "the image is glm-image-server:0.2.0-ray2.59.0",
    ),
    "a database without a version": (
        lambda c: c["services"]["database"].update(image="postgres"),
        "no version in its tag",
    ),
    "no health check": (
        lambda c: c["services"]["database"].pop("healthcheck"),
        "it has no health check",
    ),
    "a server that does not wait": (
        lambda c: c["services"]["server"].update(depends_on=["database"]),
        "it does not wait",
    ),
    "privilege escalation": (
        lambda c: c["services"]["server"].pop("security_opt"),
        "allows privilege escalation",
    ),
    "a missing volume": (lambda c: c["volumes"].pop("files"), "the volume files does not exist"),
    "an unknown option": (lambda c: change(c, "--host", "--listen"), "the option --listen"),
    "a missing configuration": (
        lambda c: change(c, "workstation", "none"),
        "configs/none.yaml does not exist",
    ),
    "an open configuration": (lambda c: change(c, "workstation", "two-gpus"), "clients need no API key"),
    "a key that is not set": (lambda c: change(c, "GLM_IMAGE_KEY", "KEY"), "GLM_IMAGE_KEY is not set"),
    "too few GPUs": (
        lambda c: c["services"]["server"]["deploy"]["resources"]["reservations"]["devices"][0].update(
            count=1
        ),
        "it has 1 GPUs",
    ),
    "another database": (
        lambda c: c["services"]["database"]["environment"].update(POSTGRES_DB="images"),
        "but the database is",
    ),
    "a stop that interrupts requests": (
        lambda c: c["services"]["server"].update(stop_grace_period="60s"),
        "stop_grace_period 60s is not above",
    ),
    "metrics that are not published": (
        lambda c: change(c, "9100", "9101"),
        "--metrics-port is not published",
    ),
    "a server that cannot be reached": (
        lambda c: change(c, "--host 0.0.0.0", ""),
        "listens inside the container only",
    ),
}


def change(compose: Compose, old: str, new: str) -> None:
    command = compose["services"]["server"]["command"]
    assert old in command[-1]
    command[-1] = command[-1].replace(old, new)


@needs_packages
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_compose_is_caught(mistake: str) -> None:
    plant, problem = MISTAKES[mistake]
    compose = copy.deepcopy(COMPOSE)
    plant(compose)
    found = check_compose(compose)
    assert any(problem in one for one in found), found
