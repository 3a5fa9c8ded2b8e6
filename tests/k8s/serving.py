"""Checks that a RayService's configuration fits its cluster: versions, placement, bounds and timeouts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from ray.serve._private.build_app import build_app as built
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from serve_app import __version__
from serve_app.app import build_app
from serve_app.config import AppConfig
from tests.k8s.manifests import (
    ROOT,
    cluster,
    groups,
    name_of,
    of_kind,
    pods,
    quantity,
    ray_service,
    seconds,
    variables,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.k8s.manifests import Manifests

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Seconds that Ray drains a node on SIGTERM; see `Node._drain_node_before_shutdown` in Ray's node.py."""
TO_MOVE_S = 60
"""Minimum seconds for a drained node's replicas to be replaced on another node."""


def locked(package: str) -> str:
    """Returns a package's version in the lock file."""
    (version,) = re.findall(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return str(version)


def image_tag() -> str:
    """Returns the image's tag: this project's version and Ray's."""
    return f"{__version__}-ray{locked('ray')}"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment that Ray Serve creates for the application.

    Attributes:
        name: name of the deployment.
        needs: Ray resources of one replica.
        max_replicas: upper bound of replicas.
        min_replicas: replicas that run without any work.
        shutdown_s: seconds that a replica may take to shut down.
    """

    name: str
    needs: dict[str, float]
    max_replicas: int
    min_replicas: int
    shutdown_s: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The parsed contents of a `serveConfigV2`."""

    port: int
    host: str
    app: AppConfig
    deployments: tuple[Deployment, ...]


@cache
def serving(text: str) -> Serving:
    """Parses a `serveConfigV2`.

    Raises:
        ValueError: Ray Serve or the application rejects it.
    """
    parts = yaml.load(text, yaml.CSafeLoader)  # faster than safe_load
    file = ServeDeploySchema.model_validate(parts)
    (application,) = file.applications
    # Ray ignores unknown keys.
    for model, part in (
        (ServeDeploySchema, parts),
        (ServeApplicationSchema, parts["applications"][0]),
        (HTTPOptionsSchema, parts["http_options"]),
    ):
        if unknown := part.keys() - model.model_fields.keys():
            raise ValueError(f"Ray Serve does not know {', '.join(sorted(unknown))}")
    if application.import_path != "serve_app.app:build_app":
        raise ValueError(f"import_path is {application.import_path}, not serve_app.app:build_app")
    config = AppConfig.model_validate(application.args)
    made = built(build_app(config), name=application.name)
    return Serving(
        port=file.http_options.port,
        host=file.http_options.host,
        app=config,
        deployments=tuple(_deployment(one) for one in made.deployments),
    )


def _deployment(made: Any) -> Deployment:
    config, options = made._deployment_config, made.ray_actor_options or {}
    scaling = config.autoscaling_config
    needs = {"CPU": float(options.get("num_cpus", 1)), "GPU": float(options.get("num_gpus", 0))}
    return Deployment(
        name=made.name,
        needs={name: n for name, n in (needs | options.get("resources", {})).items() if n},
        max_replicas=scaling.max_replicas if scaling else config.num_replicas,
        min_replicas=scaling.min_replicas if scaling else config.num_replicas,
        shutdown_s=config.graceful_shutdown_timeout_s,
    )


def read(manifests: Manifests) -> Serving | None:
    """Returns the RayService's configuration, or None if `check_configuration` reports it as invalid."""
    try:
        return serving(ray_service(manifests)["spec"]["serveConfigV2"])
    except (TypeError, ValueError, KeyError, yaml.YAMLError):
        return None


def check_configuration(manifests: Manifests) -> list[str]:
    """Checks that Ray Serve and the application accept the configuration, and that clients need a key."""
    try:
        config = serving(ray_service(manifests)["spec"]["serveConfigV2"])
    except ValidationError as error:
        return [f"serveConfigV2: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
        return [f"serveConfigV2: {error}"]
    problems = []
    if config.host != "0.0.0.0":  # noqa: S104 - compared, not bound
        problems.append(f"serveConfigV2: http_options.host {config.host} cannot be reached from other pods")
    if config.app.auth.open or not config.app.auth.api_keys:
        problems.append("serveConfigV2: clients need no API key; set auth.api_keys")
    if config.app.cluster.autoscaling != bool(cluster(manifests).get("enableInTreeAutoscaling")):
        problems.append("serveConfigV2: cluster.autoscaling differs from enableInTreeAutoscaling")
    return problems


def check_source(manifests: Manifests) -> list[str]:
    """Checks that the configuration is an unchanged file of configs/."""
    files = (ROOT / "configs").glob("cluster*.yaml")
    if ray_service(manifests)["spec"]["serveConfigV2"] not in {file.read_text() for file in files}:
        return ["serveConfigV2: it differs from every configs/cluster*.yaml"]
    return []


def check_versions(manifests: Manifests) -> list[str]:
    """Checks that images and cluster have the lock's version of Ray, and images this server's version."""
    problems = []
    ray_version = cluster(manifests).get("rayVersion")
    if ray_version != locked("ray"):
        problems.append(f"rayVersion is {ray_version}, but the lock has {locked('ray')}")
    used = {c["image"] for pod in pods(manifests) for c in pod.containers if c["name"].startswith("ray-")}
    if len(used) != 1:
        problems.append(f"Ray's containers use different images: {sorted(used)}")
    for pod in pods(manifests):
        for container in pod.containers:
            image, _, tag = container["image"].partition(":")
            if image == "glm-image-server":
                if tag not in (image_tag(), f"{image_tag()}-cpu"):
                    problems.append(f"{pod.name}: the image tag is {tag}, not {image_tag()}")
            elif not re.search(r"\d", tag):
                problems.append(f"{pod.name}: {container['image']} has no version in its tag")
    return problems


def _offered(group: dict[str, Any]) -> dict[str, float]:
    """Returns the Ray resources of one pod of a group."""
    (container, *_) = group["template"]["spec"]["containers"]
    limits = container["resources"].get("limits", {})
    own = {name: quantity(value) for name, value in group.get("resources", {}).items()}
    found = {"CPU": quantity(limits.get("cpu", 0)), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
    return found | own


def _groups_for(deployment: Deployment, manifests: Manifests) -> list[str]:
    """Returns the groups whose pods can hold a replica."""
    return [
        name
        for name, group in groups(manifests).items()
        if all(_offered(group).get(what, 0) >= n for what, n in deployment.needs.items())
    ]


def check_places(manifests: Manifests) -> list[str]:
    """Checks that replicas fit the pods of exactly one group, and that the group allows enough pods."""
    config = read(manifests)
    if config is None:
        return []
    problems = []
    all_groups = groups(manifests)
    placed: dict[str, list[Deployment]] = {name: [] for name in all_groups}
    for deployment in config.deployments:
        fitting = _groups_for(deployment, manifests)
        if not fitting:
            problems.append(f"{deployment.name} fits no pod of any group; it needs {deployment.needs}")
        elif len(fitting) > 1:
            problems.append(f"{deployment.name} may be placed in {' or '.join(fitting)}")
        else:
            placed[fitting[0]].append(deployment)
    for name, deployments in placed.items():
        if not deployments:
            problems.append(f"no deployment uses the group {name}")
        for deployment in deployments:
            offered = _offered(all_groups[name])
            a_pod = min(int(offered[what] // n) for what, n in deployment.needs.items())
            room = a_pod * all_groups[name]["maxReplicas"]
            if deployment.max_replicas > room:
                most = f"maxReplicas of the group {name} limits them to {room}"
                problems.append(f"{deployment.name} may have {deployment.max_replicas} replicas, but {most}")
            if deployment.min_replicas > a_pod * all_groups[name]["minReplicas"]:
                least = f"minReplicas of the group {name} guarantees fewer pods"
                problems.append(
                    f"{deployment.name} always has {deployment.min_replicas} replicas, but {least}"
                )
    return problems


def check_numbers(manifests: Manifests) -> list[str]:
    """Checks the autoscaler's bounds: without work, only the ingress group has pods."""
    problems = []
    head = cluster(manifests)["headGroupSpec"]
    cpus = head.get("resources", {}).get("CPU", head.get("rayStartParams", {}).get("num-cpus"))
    if cpus != "0":
        problems.append("head: Ray may place replicas on it; set num-cpus to 0")
    if not cluster(manifests).get("enableInTreeAutoscaling"):
        problems.append("the cluster does not scale; set enableInTreeAutoscaling to true")
    if cluster(manifests).get("autoscalerOptions", {}).get("version") != "v2":
        problems.append("autoscalerOptions.version is not v2")
    for name, group in groups(manifests).items():
        least, most = group["minReplicas"], group["maxReplicas"]
        if least > most:
            problems.append(f"{name}: minReplicas is above maxReplicas")
        elif "ingress" not in group.get("resources", {}):
            if least != 0:
                problems.append(f"{name}: minReplicas is {least}, not 0, which keeps GPUs without work")
        elif least == most:
            problems.append(f"{name}: a drained pod cannot be replaced; set maxReplicas above {most}")
    return problems


def check_timeouts(manifests: Manifests) -> list[str]:
    """Checks that each timeout exceeds the one of the layer inside, from the deadline to the pod's grace."""
    config = read(manifests)
    if config is None:
        return []
    inner = min(config.deployments, key=lambda one: one.shutdown_s)
    outer = max(config.deployments, key=lambda one: one.shutdown_s)
    deadline = ("limits.deadline_s", config.app.limits.deadline_s)
    problems = _in_order([deadline, (f"graceful_shutdown_timeout_s of {inner.name}", inner.shutdown_s)])
    ending = (f"graceful_shutdown_timeout_s of {outer.name}", outer.shutdown_s)
    deletion = ray_service(manifests)["spec"].get("rayClusterDeletionDelaySeconds", 60)
    problems += _in_order([ending, ("rayClusterDeletionDelaySeconds", deletion)])
    outside = list(edges(manifests))
    for edge in outside:
        problems += _in_order([ending, edge])
    for pod in workers(manifests):
        draining = float(variables(pod.spec["containers"][0]).get(DRAIN) or 30)
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        drain = (f"{DRAIN} of {pod.name}", draining)
        for edge in outside or [ending]:
            problems += _in_order([edge, drain, ("terminationGracePeriodSeconds", grace)])
        if draining - outer.shutdown_s < TO_MOVE_S:
            problems.append(f"{pod.name}: draining leaves less than {TO_MOVE_S} s for a replacement to start")
    return problems


def edges(manifests: Manifests) -> Iterator[tuple[str, float]]:
    """Yields the timeouts of the gateways in front of the server, by name."""
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for name in ("request", "backendRequest"):
                yield f"{name} of {name_of(route)}", seconds(rule.get("timeouts", {}).get(name, "15s"))
    for ingress in of_kind(manifests, "Ingress"):
        annotations = ingress["metadata"].get("annotations", {})
        for name in ("read", "send"):
            value = annotations.get(f"nginx.ingress.kubernetes.io/proxy-{name}-timeout", "60")
            yield f"proxy-{name}-timeout of {name_of(ingress)}", float(value)


def _in_order(chain: list[tuple[str, float]]) -> list[str]:
    return [
        f"{inner} ({inner_s:g} s) must be below {outer} ({outer_s:g} s)"
        for (inner, inner_s), (outer, outer_s) in pairwise(chain)
        if inner_s >= outer_s
    ]


def check_edge(manifests: Manifests) -> list[str]:
    """Checks that gateways pass large bodies, use the right port and remove Ray's control headers."""
    config = read(manifests)
    if config is None:
        return []
    problems = []
    backend = (f"{ray_service(manifests)['metadata']['name']}-serve-svc", config.port)
    headers = {"x-request-timeout-seconds", "x-request-disconnect-disabled"}
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            removed = {
                name
                for one in rule.get("filters", [])
                for name in one.get("requestHeaderModifier", {}).get("remove", [])
            }
            problems += [
                f"{name_of(route)}: it does not remove the header {name}"
                for name in sorted(headers - removed)
            ]
            for one in rule["backendRefs"]:
                if (one["name"], one["port"]) != backend:
                    problems.append(
                        f"{name_of(route)}: its backend is {one['name']}:{one['port']}, not {backend}"
                    )
    for ingress in of_kind(manifests, "Ingress"):
        annotations = ingress["metadata"].get("annotations", {})
        size = annotations.get("nginx.ingress.kubernetes.io/proxy-body-size", "1m")
        if _nginx_bytes(size) < config.app.limits.max_body_bytes:
            problems.append(f"{name_of(ingress)}: proxy-body-size {size} is below limits.max_body_bytes")
        snippet = annotations.get("nginx.ingress.kubernetes.io/configuration-snippet", "")
        problems += [
            f"{name_of(ingress)}: it does not remove the header {name}"
            for name in sorted(headers)
            if name not in snippet
        ]
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                if (service["name"], service["port"]["number"]) != backend:
                    problems.append(f"{name_of(ingress)}: its backend is {service}, not {backend}")
    return problems


def _nginx_bytes(size: str) -> float:
    units = {"k": 2**10, "m": 2**20, "g": 2**30}
    if size[-1].lower() in units:
        return float(size[:-1]) * units[size[-1].lower()]
    return float(size)


def check_models(manifests: Manifests) -> list[str]:
    """Checks that stages mount their checkpoints read-only and do not contact the Hub."""
    config = read(manifests)
    problems = []
    checkpoints = {model.checkpoint for model in config.app.models} if config else set()
    folders = {checkpoint for checkpoint in checkpoints if checkpoint.startswith("/")}
    for pod in workers(manifests):
        (container, *_) = pod.spec["containers"]
        if variables(container).get("HF_HUB_OFFLINE") != "1":
            problems.append(f"{pod.name}: it may contact the Hub; set HF_HUB_OFFLINE to 1")
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]
            for volume in pod.spec.get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        mounts = [mount for mount in container.get("volumeMounts", []) if mount["name"] in claims]
        problems += [
            f"{pod.name}: {mount['mountPath']} is not mounted read-only"
            for mount in mounts
            if any(folder.startswith(f"{mount['mountPath']}/") for folder in folders)
            and not (mount.get("readOnly") and claims[mount["name"]].get("readOnly"))
        ]
        if pod.role in ("prior", "decoder"):
            problems += [
                f"{pod.name}: no volume contains {folder}"
                for folder in sorted(folders)
                if not any(folder.startswith(f"{mount['mountPath']}/") for mount in mounts)
            ]
    return problems


CHECKS = (
    check_configuration,
    check_source,
    check_versions,
    check_places,
    check_numbers,
    check_timeouts,
    check_edge,
    check_models,
)
