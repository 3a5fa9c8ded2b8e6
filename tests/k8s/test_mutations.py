"""Mutation tests of the manifest checks: each breaks one invariant and expects its check to report it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import checks, serving
from tests.k8s.manifests import (
    Manifests,
    cluster,
    groups,
    named,
    needs_kustomize,
    overlay,
    ray_service,
)

pytestmark = needs_kustomize
Check = Callable[[Manifests], list[str]]
Mutation = Callable[[Manifests], object]


def spec(manifests: Manifests, group: str) -> dict[str, Any]:
    """Returns the pod specification of a worker group."""
    found: dict[str, Any] = groups(manifests)[group]["template"]["spec"]
    return found


def container(manifests: Manifests, group: str) -> dict[str, Any]:
    """Returns the Ray container of a worker group."""
    found: dict[str, Any] = spec(manifests, group)["containers"][0]
    return found


def limits(manifests: Manifests, group: str) -> dict[str, str]:
    """Returns the resource limits of a worker group's container."""
    found: dict[str, str] = container(manifests, group)["resources"]["limits"]
    return found


def remove_policy(manifests: Manifests, name: str) -> None:
    """Removes a NetworkPolicy."""
    manifests.remove(named(manifests, "NetworkPolicy", name))


def replace_configuration(manifests: Manifests, old: str, new: str) -> None:
    """Replaces text in the RayService's configuration."""
    whole = ray_service(manifests)["spec"]
    assert old in whole["serveConfigV2"]
    whole["serveConfigV2"] = whole["serveConfigV2"].replace(old, new)


STRICT_PROBE = {
    "httpGet": {"path": "/api/healthz", "port": 52365},
    "periodSeconds": 5,
    "failureThreshold": 1,
}
PLAIN_KEY = {"name": "GLM_IMAGE_KEY", "value": "abc"}

MUTATIONS: dict[str, tuple[Check, Mutation, str]] = {
    "probes tolerate a busy container": (
        checks.check_probes,
        lambda m: container(m, "decoder").update(livenessProbe=STRICT_PROBE),
        "decoder: livenessProbe is stricter than KubeRay's",
    ),
    "containers do not run as root": (
        checks.check_security,
        lambda m: spec(m, "decoder")["securityContext"].update(runAsUser=0),
        "decoder: ray-worker runs as root",
    ),
    "network policies deny by default": (
        checks.check_network,
        lambda m: remove_policy(m, "deny-all"),
        "no NetworkPolicy denies traffic by default",
    ),
    "network policies allow the needed traffic": (
        checks.check_network,
        lambda m: remove_policy(m, "dns"),
        "decoder cannot reach DNS",
    ),
    "containers have memory limits": (
        checks.check_security,
        lambda m: limits(m, "ingress").pop("memory"),
        "ingress: ray-worker has no memory limit",
    ),
    "pods have the GPUs that the configuration needs": (
        serving.check_places,
        lambda m: limits(m, "decoder").pop("nvidia.com/gpu"),
        "glm-image-decoder fits no pod of any group",
    ),
    "rayVersion equals the lock": (
        serving.check_versions,
        lambda m: cluster(m).update(rayVersion="2.59.0"),
        "rayVersion is 2.59.0",
    ),
    "secrets are not in plain text": (
        checks.check_secrets,
        lambda m: container(m, "ingress")["env"].append(PLAIN_KEY),
        "ingress: GLM_IMAGE_KEY is in plain text",
    ),
    "the image tag equals the lock": (
        serving.check_versions,
        lambda m: container(m, "decoder").update(image="glm-image-server:0.2.0-ray2.59.0"),
        "decoder: the image tag is 0.2.0-ray2.59.0",
    ),
    "the autoscaler may start a pod for every replica": (
        serving.check_places,
        lambda m: groups(m)["decoder"].update(maxReplicas=7),
        "glm-image-decoder may have 8 replicas, but maxReplicas",
    ),
    "serveConfigV2 equals a file of configs/": (
        serving.check_source,
        lambda m: replace_configuration(m, "max_replicas: 8", "max_replicas: 9"),
        "serveConfigV2: it differs from every configs/cluster*.yaml",
    ),
}
"""Checks, mutations and expected problems, by the invariant that a mutation breaks."""


@pytest.mark.parametrize("invariant", MUTATIONS)
def test_a_broken_invariant_is_reported(invariant: str) -> None:
    check, mutate, problem = MUTATIONS[invariant]
    manifests: Manifests = json.loads(overlay("site"))
    assert check(manifests) == []
    mutate(manifests)
    found = check(manifests)
    assert any(problem in one for one in found), found
    assert check in checks.CHECKS
