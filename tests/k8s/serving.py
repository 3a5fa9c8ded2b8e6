"""Whether a RayService's configuration and its cluster fit: versions, places, numbers, timeouts."""

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
"""See `Node._drain_node_before_shutdown` in Ray's _private/node.py."""
TO_MOVE_S = 60
"""What a drained node's replicas have at least until another node must have taken over."""


def locked(package: str) -> str:
    """The version that the lock has of a package."""
    (version,) = re.findall(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return str(version)


def own_version() -> str:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(version)


def image_tag() -> str:
    """What an image is tagged with: its contents change with either of the two."""
    return f"{own_version()}-ray{locked('ray')}"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment of the application as Ray Serve would make it.

    Attributes:
        name: its own.
        needs: what one replica takes, as Ray counts it.
        most: replicas that there may be.
        at_once: replicas that there are whether or not there is work.
        ending_s: what one may take to end.
    """

    name: str
    needs: dict[str, float]
    most: int
    at_once: int
    ending_s: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a `serveConfigV2` says."""

    port: int
    host: str
    app: AppConfig
    deployments: tuple[Deployment, ...]


@cache
def serving(text: str) -> Serving:
    """Read a `serveConfigV2`.

    Raises:
        ValueError: Ray Serve or the application would refuse it.
    """
    parts = yaml.load(text, yaml.CSafeLoader)  # safe_load's faster twin
    file = ServeDeploySchema.model_validate(parts)
    (application,) = file.applications
    # Ray lets keys pass that it does not know.
    for model, part in (
        (ServeDeploySchema, parts),
        (ServeApplicationSchema, parts["applications"][0]),
        (HTTPOptionsSchema, parts["http_options"]),
    ):
        if unknown := part.keys() - model.model_fields.keys():
            raise ValueError(f"Ray Serve has no {', '.join(sorted(unknown))}")
    if application.import_path != "serve_app.app:build_app":
        raise ValueError(f"import_path is {application.import_path}")
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
        most=scaling.max_replicas if scaling else config.num_replicas,
        at_once=scaling.min_replicas if scaling else config.num_replicas,
        ending_s=config.graceful_shutdown_timeout_s,
    )


def read(manifests: Manifests) -> Serving | None:
    """What the RayService says, or None where `check_configuration` has something to say."""
    try:
        return serving(ray_service(manifests)["spec"]["serveConfigV2"])
    except (TypeError, ValueError, KeyError, yaml.YAMLError):
        return None


def check_configuration(manifests: Manifests) -> list[str]:
    """Whether Ray Serve and the application take it, and whoever comes needs a key."""
    try:
        config = serving(ray_service(manifests)["spec"]["serveConfigV2"])
    except ValidationError as error:
        return [f"serveConfigV2: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
        return [f"serveConfigV2: {error}"]
    problems = []
    if config.host != "0.0.0.0":  # noqa: S104 - compared, not bound
        problems.append(f"serveConfigV2: nobody reaches a pod's {config.host}")
    if config.app.auth.open or not config.app.auth.api_keys:
        problems.append("serveConfigV2: whoever reaches the port may use the server")
    if config.app.cluster.autoscaling != bool(cluster(manifests).get("enableInTreeAutoscaling")):
        problems.append("serveConfigV2: cluster.autoscaling is not what the cluster does")
    return problems


def check_versions(manifests: Manifests) -> list[str]:
    """Whether images, the cluster and the lock have the same Ray, and images this version of the server."""
    problems = []
    ray_version = cluster(manifests).get("rayVersion")
    if ray_version != locked("ray"):
        problems.append(f"rayVersion is {ray_version}, the lock has {locked('ray')}")
    used = {c["image"] for pod in pods(manifests) for c in pod.containers if c["name"].startswith("ray-")}
    if len(used) != 1:
        problems.append(f"Ray's containers have several images: {sorted(used)}")
    for pod in pods(manifests):
        for container in pod.containers:
            image, _, tag = container["image"].partition(":")
            if image == "glm-image-server":
                if tag not in (image_tag(), f"{image_tag()}-cpu"):
                    problems.append(f"{pod.name}: the tag {tag} is not the lock's, {image_tag()}")
            elif not re.search(r"\d", tag):
                problems.append(f"{pod.name}: {container['image']} is not of a certain version")
    return problems


def _offered(group: dict[str, Any]) -> dict[str, float]:
    """What one pod of a group has, as KubeRay tells Ray."""
    (container, *_) = group["template"]["spec"]["containers"]
    limits = container["resources"].get("limits", {})
    own = {name: quantity(value) for name, value in group.get("resources", {}).items()}
    found = {"CPU": quantity(limits.get("cpu", 0)), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
    return found | own


def _groups_for(deployment: Deployment, manifests: Manifests) -> list[str]:
    """The groups of which a pod can hold a replica."""
    return [
        name
        for name, group in groups(manifests).items()
        if all(_offered(group).get(what, 0) >= n for what, n in deployment.needs.items())
    ]


def check_places(manifests: Manifests) -> list[str]:
    """Whether every replica fits a pod of one group alone, and there are pods for as many as there may be."""
    config = read(manifests)
    if config is None:
        return []
    problems = []
    all_groups = groups(manifests)
    placed: dict[str, list[Deployment]] = {name: [] for name in all_groups}
    for deployment in config.deployments:
        fitting = _groups_for(deployment, manifests)
        if not fitting:
            problems.append(f"{deployment.name} fits no pod of any group: it needs {deployment.needs}")
        elif len(fitting) > 1:
            problems.append(f"{deployment.name} may land in {' or '.join(fitting)}")
        else:
            placed[fitting[0]].append(deployment)
    for name, deployments in placed.items():
        if not deployments:
            problems.append(f"the group {name} has no deployment")
        for deployment in deployments:
            offered = _offered(all_groups[name])
            a_pod = min(int(offered[what] // n) for what, n in deployment.needs.items())
            room = a_pod * all_groups[name]["maxReplicas"]
            if deployment.most > room:
                problems.append(
                    f"{deployment.name} has up to {deployment.most} replicas, and the group {name} room for "
                    f"{room}: max_replicas is above maxReplicas"
                )
            if deployment.at_once > a_pod * all_groups[name]["minReplicas"]:
                problems.append(
                    f"{deployment.name} always has {deployment.at_once} replicas, the group {name} fewer pods"
                )
    return problems


def check_numbers(manifests: Manifests) -> list[str]:
    """Whether the groups grow and shrink as meant: without work there are ingresses alone."""
    problems = []
    head = cluster(manifests)["headGroupSpec"]
    cpus = head.get("resources", {}).get("CPU", head.get("rayStartParams", {}).get("num-cpus"))
    if cpus != "0":
        problems.append("head: it has CPUs for work; set num-cpus to 0")
    if not cluster(manifests).get("enableInTreeAutoscaling"):
        problems.append("the cluster does not scale: enableInTreeAutoscaling")
    if cluster(manifests).get("autoscalerOptions", {}).get("version") != "v2":
        problems.append("autoscalerOptions.version is not v2")
    for name, group in groups(manifests).items():
        least, most = group["minReplicas"], group["maxReplicas"]
        if least > most:
            problems.append(f"{name}: minReplicas is above maxReplicas")
        elif "ingress" not in group.get("resources", {}):
            if least != 0:
                problems.append(f"{name}: it costs GPUs without work; minReplicas is {least}, not 0")
        elif least == most:
            problems.append(f"{name}: no pod can take over from one that is drained; maxReplicas is {most}")
    return problems


def check_timeouts(manifests: Manifests) -> list[str]:
    """Whether everybody waits longer than who is next inside, from the edge to the end of a pod."""
    config = read(manifests)
    if config is None:
        return []
    inner = min(config.deployments, key=lambda one: one.ending_s)
    outer = max(config.deployments, key=lambda one: one.ending_s)
    problems = _in_order(
        [
            ("limits.deadline_s", config.app.limits.deadline_s),
            (f"graceful_shutdown_timeout_s of {inner.name}", inner.ending_s),
        ]
    )
    ending = (f"graceful_shutdown_timeout_s of {outer.name}", outer.ending_s)
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
        if draining - outer.ending_s < TO_MOVE_S:
            problems.append(
                f"{pod.name}: draining leaves no {TO_MOVE_S} seconds until another node must take over"
            )
    return problems


def edges(manifests: Manifests) -> Iterator[tuple[str, float]]:
    """For how long what is in front of the server waits for it."""
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
        f"timeouts out of order: {inner} {inner_s:g} is not below {outer} {outer_s:g}"
        for (inner, inner_s), (outer, outer_s) in pairwise(chain)
        if inner_s >= outer_s
    ]


def check_edge(manifests: Manifests) -> list[str]:
    """Whether large bodies come through, to the right port, and Ray's own headers do not."""
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
            problems += [f"{name_of(route)}: lets {name} through" for name in sorted(headers - removed)]
            for one in rule["backendRefs"]:
                if (one["name"], one["port"]) != backend:
                    problems.append(f"{name_of(route)}: leads to {one['name']}:{one['port']}, not {backend}")
    for ingress in of_kind(manifests, "Ingress"):
        annotations = ingress["metadata"].get("annotations", {})
        size = annotations.get("nginx.ingress.kubernetes.io/proxy-body-size", "1m")
        if _nginx_bytes(size) < config.app.limits.max_body_bytes:
            problems.append(f"{name_of(ingress)}: proxy-body-size {size} is below limits.max_body_bytes")
        snippet = annotations.get("nginx.ingress.kubernetes.io/configuration-snippet", "")
        problems += [
            f"{name_of(ingress)}: lets {name} through" for name in sorted(headers) if name not in snippet
        ]
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                if (service["name"], service["port"]["number"]) != backend:
                    problems.append(f"{name_of(ingress)}: leads to {service}, not {backend}")
    return problems


def _nginx_bytes(size: str) -> float:
    units = {"k": 2**10, "m": 2**20, "g": 2**30}
    if size[-1].lower() in units:
        return float(size[:-1]) * units[size[-1].lower()]
    return float(size)


def check_models(manifests: Manifests) -> list[str]:
    """Whether stages find their checkpoints, which they cannot change, and ask nobody else for them."""
    config = read(manifests)
    problems = []
    checkpoints = {model.checkpoint for model in config.app.models} if config else set()
    folders = {checkpoint for checkpoint in checkpoints if checkpoint.startswith("/")}
    for pod in workers(manifests):
        (container, *_) = pod.spec["containers"]
        if variables(container).get("HF_HUB_OFFLINE") != "1":
            problems.append(f"{pod.name}: it may ask the Hub; set HF_HUB_OFFLINE")
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]
            for volume in pod.spec.get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        mounts = [mount for mount in container.get("volumeMounts", []) if mount["name"] in claims]
        problems += [
            f"{pod.name}: {mount['mountPath']} is mounted to be written to"
            for mount in mounts
            if any(folder.startswith(f"{mount['mountPath']}/") for folder in folders)
            and not (mount.get("readOnly") and claims[mount["name"]].get("readOnly"))
        ]
        if pod.role in ("prior", "decoder"):
            problems += [
                f"{pod.name}: there is no volume with {folder}"
                for folder in sorted(folders)
                if not any(folder.startswith(f"{mount['mountPath']}/") for mount in mounts)
            ]
    return problems


CHECKS = (
    check_configuration,
    check_versions,
    check_places,
    check_numbers,
    check_timeouts,
    check_edge,
    check_models,
)
