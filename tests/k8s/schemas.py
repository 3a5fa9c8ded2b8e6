"""Schema checks of manifests: unknown fields, missing fields and wrong types.

RayService is checked against KubeRay's own definition. Kubernetes' kinds are checked against the schemas of
two Kubernetes versions. Both reject unknown fields. For Gateway API and Prometheus's operator, a package
checks the types but accepts unknown fields. `KNOWN` lists the fields that this project uses. Rules that the
API server evaluates (CEL) are not checked.
"""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import yaml
from kubernetes_validate.utils import SchemaNotFoundError, ValidationError, validate

from tests.k8s.manifests import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.k8s.manifests import Manifest, Manifests

FOLDER = Path(__file__).parent
KUBERNETES = ("1.32", "1.36")
OTHERS = ("HTTPRoute", "PodMonitor", "PrometheusRule")
METADATA = ("name", "namespace", "labels", "annotations")
KNOWN: dict[str, dict[str, set[str]]] = {
    "HTTPRoute": {
        "spec": {"parentRefs", "hostnames", "rules"},
        "spec.parentRefs": {"name", "namespace", "sectionName"},
        "spec.rules": {"matches", "timeouts", "filters", "backendRefs"},
        "spec.rules.matches": {"path"},
        "spec.rules.timeouts": {"request", "backendRequest"},
        "spec.rules.filters": {"type", "requestHeaderModifier"},
        "spec.rules.filters.requestHeaderModifier": {"remove"},
        "spec.rules.backendRefs": {"name", "port"},
    },
    "PodMonitor": {
        "spec": {"selector", "podMetricsEndpoints"},
        "spec.podMetricsEndpoints": {"port", "interval"},
    },
    "PrometheusRule": {
        "spec": {"groups"},
        "spec.groups": {"name", "rules"},
        "spec.groups.rules": {"alert", "expr", "for", "labels", "annotations"},
    },
    "LocalQueue": {"spec": {"clusterQueue"}},
}


def check_schemas(manifests: Manifests) -> list[str]:
    """Checks every manifest against the schema of its kind."""
    problems: list[str] = []
    others: Manifests = []
    for manifest in manifests:
        kind = manifest["kind"]
        if kind == "RayService":
            problems += _errors(manifest, ray_service_schema())
        elif kind in KNOWN:
            problems += _unknown(manifest)
            others += [manifest] if kind in OTHERS else []
        else:
            problems += _builtin(json.dumps(manifest, sort_keys=True))
    return problems + _types(json.dumps(others, sort_keys=True))


@cache
def ray_service_schema() -> dict[str, Any]:
    """Returns KubeRay's schema of a RayService, closed to fields that it does not list."""
    text = (FOLDER / "schemas/ray.io_rayservices.yaml").read_text()
    definition = yaml.load(text, yaml.CSafeLoader)  # safe_load's faster twin
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    _close(schema)
    # The definition leaves metadata to Kubernetes.
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {name: {} for name in METADATA},
        "additionalProperties": False,
    }
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close(part)
    elif isinstance(schema, list):
        for part in schema:
            _close(part)


def _errors(manifest: Manifest, schema: dict[str, Any]) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        where = ".".join(map(str, error.absolute_path))
        yield f"{name_of(manifest)}: {where}: {error.message}"


@cache
def _builtin(text: str) -> list[str]:
    """Checks one manifest, given as JSON. Cached, because the package reads its schemas on every call."""
    manifest = json.loads(text)
    problems = []
    for version in KUBERNETES:
        try:
            validate(manifest, version, strict=True)
        except ValidationError as error:
            where = ".".join(map(str, error.absolute_path))
            problems.append(f"{name_of(manifest)}: {where}: {error.message} (Kubernetes {version})")
        except SchemaNotFoundError:
            problems.append(f"{name_of(manifest)}: Kubernetes {version} has no {manifest['apiVersion']}")
    return problems


def _unknown(manifest: Manifest) -> Iterator[str]:
    """Yields fields that `KNOWN` does not list."""
    known = KNOWN[manifest["kind"]]

    def look(part: Any, where: str) -> Iterator[str]:
        if isinstance(part, list):
            for one in part:
                yield from look(one, where)
        elif isinstance(part, dict) and where in known:
            for name, value in part.items():
                if name not in known[where]:
                    yield f"{name_of(manifest)}: unexpected field {where}.{name}"
                yield from look(value, f"{where}.{name}")

    yield from look(manifest.get("spec"), "spec")
    for name in manifest["metadata"].keys() - set(METADATA):
        yield f"{name_of(manifest)}: unexpected field metadata.{name}"
    for name in manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}:
        yield f"{name_of(manifest)}: unexpected field {name}"


@cache
def _types(others: str) -> list[str]:
    ran = subprocess.run(
        ["node", "validate.mjs"], cwd=FOLDER, input=others, capture_output=True, text=True, check=True
    )
    problems: list[str] = json.loads(ran.stdout)
    return problems
