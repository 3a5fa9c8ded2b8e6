"""Checks of the manifests in k8s/. Each check returns the problems it found, as sentences.

All checks pass on the overlays in k8s/. `tests.k8s.test_mutations` breaks a manifest and expects a problem.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from tests.k8s import serving
from tests.k8s.manifests import K8S, cluster, groups, name_of, of_kind, pods, ray_service, variables, workers
from tests.k8s.schemas import check_schemas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.k8s.manifests import Manifests, Pod

SECRET = re.compile(r"key|token|password|passwd|secret|credential", re.IGNORECASE)
"""Pattern of the names of environment variables that hold secrets."""
SECRETS = {"glm-image-api-keys", "glm-image-database", "glm-image-s3"}
"""Secrets that only the ingress may read."""
METRICS = {8080, 44217, 44227}
"""Ports of the head that export metrics."""
HEAD_ONLY = {8265, 6379, 10001}
"""Ports that control a cluster. Outside the namespace, only the operator needs one of them: 8265."""
INFERENCE = re.compile(r"/(v1|fal|queue|api|glm-image)\b")
PSA = "pod-security.kubernetes.io/enforce"


def check_security(manifests: Manifests) -> list[str]:
    """Checks that containers run without root, extra privileges or unlimited memory."""
    problems = []
    for pod in pods(manifests):
        spec, whole = pod.spec, pod.spec.get("securityContext", {})
        problems += [
            f"{pod.name}: uses {one}" for one in ("hostNetwork", "hostPID", "hostIPC") if spec.get(one)
        ]
        problems += [
            f"{pod.name}: mounts a hostPath volume" for one in spec.get("volumes", []) if "hostPath" in one
        ]
        if pod.role != "head" and spec.get("automountServiceAccountToken") is not False:
            problems.append(f"{pod.name}: a service account token is mounted")
        for container in pod.containers:
            context = whole | container.get("securityContext", {})
            problems += _context(f"{pod.name}: {container['name']}", context)
            if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
                problems.append(f"{pod.name}: {container['name']} runs as root")
            if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
                problems.append(f"{pod.name}: {container['name']} has no seccomp profile")
            if not container["resources"].get("limits", {}).get("memory"):
                problems.append(f"{pod.name}: {container['name']} has no memory limit")
    autoscaler = cluster(manifests).get("autoscalerOptions", {})
    problems += _context("the autoscaler", autoscaler.get("securityContext", {}))
    for namespace in of_kind(manifests, "Namespace"):
        if namespace["metadata"].get("labels", {}).get(PSA) not in ("baseline", "restricted"):
            problems.append(f"{name_of(namespace)}: allows privileged pods")
    return problems


def _context(who: str, context: dict[str, Any]) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{who} allows privilege escalation"
    if context.get("privileged"):
        yield f"{who} is privileged"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield f"{who} does not drop all capabilities"
    if context.get("capabilities", {}).get("add"):
        yield f"{who} adds capabilities"


def check_secrets(manifests: Manifests) -> list[str]:
    """Checks that manifests contain no secrets, and that each pod reads only the secrets it needs."""
    problems = [f"{name_of(one)}: Secrets must not be committed" for one in of_kind(manifests, "Secret")]
    for pod in pods(manifests):
        for container in pod.containers:
            for name, value in variables(container).items():
                if value and SECRET.search(name):
                    problems.append(f"{pod.name}: {name} is in plain text")
            read = set(_secrets_of(container))
            if pod.role != "ingress" and read & SECRETS:
                problems.append(f"{pod.name}: it reads {', '.join(sorted(read & SECRETS))}")
            if pod.role in groups(manifests) and "huggingface" in read:
                problems.append(f"{pod.name}: it reads the Hub's token")
    password = cluster(manifests).get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    if "value" in password:
        problems.append("gcsFaultToleranceOptions.redisPassword is in plain text")
    if cluster(manifests).get("authOptions", {}).get("mode") != "token":
        problems.append("Ray requires no token; set authOptions.mode to token")
    return problems + list(_keys(manifests))


def _secrets_of(container: dict[str, Any]) -> Iterator[str]:
    for one in container.get("envFrom", []):
        if "secretRef" in one:
            yield one["secretRef"]["name"]
    for one in container.get("env", []):
        if "secretKeyRef" in one.get("valueFrom", {}):
            yield one["valueFrom"]["secretKeyRef"]["name"]


def _keys(manifests: Manifests) -> Iterator[str]:
    """Checks that the ingress reads the Secrets of its API keys, database and object store."""
    config = serving.read(manifests)
    if config is None:
        return
    (ingress,) = (pod for pod in pods(manifests) if pod.role == "ingress")
    read = {name for container in ingress.containers for name in _secrets_of(container)}
    needed = {
        "glm-image-api-keys": any(key.secret_env for key in config.app.auth.api_keys),
        "glm-image-database": config.app.database.url.startswith("postgresql://"),
        "glm-image-s3": config.app.storage.url.startswith("s3://"),
    }
    for name, is_needed in needed.items():
        if is_needed and name not in read:
            yield f"{ingress.name}: it does not read the Secret {name}"


def check_network(manifests: Manifests) -> list[str]:
    """Checks that network policies deny all traffic by default and allow only the traffic that pods need."""
    problems: list[str] = []
    policies = of_kind(manifests, "NetworkPolicy")
    if not any(
        one["spec"]["podSelector"] == {}
        and set(one["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not one["spec"].get("ingress")
        and not one["spec"].get("egress")
        for one in policies
    ):
        problems.append("no NetworkPolicy denies traffic by default")
    all_pods = list(pods(manifests))
    for policy in policies:
        name, spec = name_of(policy), policy["spec"]
        selected = [pod for pod in all_pods if pod.is_selected(spec["podSelector"])]
        if not selected and "redis-cleanup" not in json.dumps(spec["podSelector"]):
            problems.append(f"{name}: its selector matches no pod")
        for rule in spec.get("ingress", []):
            problems += [f"{name}: {one}" for one in _rule(rule, "from")]
            ports = {port["port"] for port in rule.get("ports", [])}
            if any("namespaceSelector" in peer for peer in rule.get("from", [])):
                problems += [f"{name}: {one}" for one in _from_outside(rule, ports)]
        for rule in spec.get("egress", []):
            problems += [f"{name}: {one}" for one in _rule(rule, "to")]
    return problems + list(_reaches(manifests, policies))


def _rule(rule: dict[str, Any], side: str) -> Iterator[str]:
    peers = rule.get(side, [])
    if not peers:
        yield "one of its rules allows all peers"
    for peer in peers:
        if peer == {} or peer.get("namespaceSelector") == {} or peer.get("podSelector") == {}:
            yield "one of its rules allows all peers"
        block = peer.get("ipBlock")
        if block and (side == "from" or not rule.get("ports")):
            yield f"one of its rules allows all of {block['cidr']}"
        if "namespaceSelector" in peer and not rule.get("ports"):
            yield "one of its rules opens all ports to another namespace"


def _from_outside(rule: dict[str, Any], ports: set[int]) -> Iterator[str]:
    is_operator = "kuberay-operator" in json.dumps(rule["from"])
    for port in sorted(ports & HEAD_ONLY):
        if not (is_operator and port == 8265):
            yield f"another namespace reaches port {port}, which controls the cluster"


def _reaches(manifests: Manifests, policies: Manifests) -> Iterator[str]:
    """Checks that pods can connect to each other and to DNS, the database and the API server."""
    ray = [pod for pod in pods(manifests) if pod.name.startswith("RayService")]
    for server in ray:
        for client in ray:
            if not _may(policies, client, server):
                yield f"{client.name} cannot reach {server.name}"
    for pod in ray:
        needs = {53: "DNS"}
        if pod.role == "ingress" and "glm-image-database" in json.dumps(pod.spec):
            needs |= {5432: "the database", 443: "the object store"}
        if pod.role == "head":
            needs |= {443: "the API server"}
        for port, what in needs.items():
            if not any(port in _ports(rule) for rule in _rules(policies, pod, "egress")):
                yield f"{pod.name} cannot reach {what}"
    if of_kind(manifests, "HTTPRoute") or of_kind(manifests, "Ingress"):
        config = serving.read(manifests)
        if config is None:
            return
        port = config.port
        for pod in workers(manifests):
            if not any(port in _ports(rule) and _is_other(rule) for rule in _rules(policies, pod, "ingress")):
                yield f"{pod.name}: the gateway cannot reach port {port}"


def _ports(rule: dict[str, Any]) -> set[int]:
    return {port["port"] for port in rule.get("ports", [])}


def _is_other(rule: dict[str, Any]) -> bool:
    return any("namespaceSelector" in peer for peer in rule.get("from", []))


def _rules(policies: Manifests, pod: Pod, direction: str) -> Iterator[dict[str, Any]]:
    for policy in policies:
        if pod.is_selected(policy["spec"]["podSelector"]):
            yield from policy["spec"].get(direction, [])


def _may(policies: Manifests, client: Pod, server: Pod) -> bool:
    """Returns whether policies on both sides allow connections on every port."""
    return any(
        server.is_selected(peer["podSelector"])
        for rule in _rules(policies, client, "egress")
        if not rule.get("ports")
        for peer in rule["to"]
        if "podSelector" in peer
    ) and any(
        client.is_selected(peer["podSelector"])
        for rule in _rules(policies, server, "ingress")
        if not rule.get("ports")
        for peer in rule.get("from", [])
        if "podSelector" in peer
    )


def check_disruption(manifests: Manifests) -> list[str]:
    """Checks that evictions keep one ingress, and keep the head if the cluster cannot survive its loss."""
    problems = []
    all_pods = list(pods(manifests))
    protected: dict[str, Any] = {}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        spec = budget["spec"]
        selected = [pod for pod in all_pods if pod.is_selected(spec["selector"])]
        if not selected:
            problems.append(f"{name_of(budget)}: its selector matches no pod")
        # Kubernetes does not know the desired number of pods of a RayService.
        if not isinstance(spec.get("minAvailable"), int) or "maxUnavailable" in spec:
            problems.append(
                f"{name_of(budget)}: Ray's pods need minAvailable as a number, without maxUnavailable"
            )
        protected |= {pod.role: spec.get("minAvailable") for pod in selected}
    ingress = next(group for group in groups(manifests).values() if "ingress" in group.get("resources", {}))
    least = ingress.get("minReplicas") or 0
    if least > 1 and "ingress" not in protected:
        problems.append("all ingresses may be evicted at once")
    if isinstance(protected.get("ingress"), int) and protected["ingress"] >= least:
        problems.append("no ingress may be evicted, so that its node cannot be drained")
    survives = "gcsFaultToleranceOptions" in cluster(manifests)
    if survives and "head" in protected:
        problems.append("the head's node cannot be drained, although the cluster would survive it")
    if least > 1 and not survives and "head" not in protected:
        problems.append("the head may be evicted, which ends the cluster")
    return problems


def check_probes(manifests: Manifests) -> list[str]:
    """Checks that probes replacing KubeRay's own tolerate a busy container and generate no images."""
    problems = []
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
                probe = container.get(kind)
                if probe is None or not pod.name.startswith("RayService"):
                    continue
                if INFERENCE.search(json.dumps(probe)):
                    problems.append(f"{pod.name}: {kind} generates images")
                patience = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
                if probe.get("timeoutSeconds", 1) < 2 or (kind == "livenessProbe" and patience < 60):
                    problems.append(f"{pod.name}: {kind} is stricter than KubeRay's")
    return problems


def check_ports(manifests: Manifests) -> list[str]:
    """Checks that ports have the names and numbers that the gateway and Prometheus use."""
    config = serving.read(manifests)
    if config is None:
        return []
    problems, port = [], config.port
    for pod in pods(manifests):
        if not pod.name.startswith("RayService"):
            continue
        (container, *_) = pod.spec["containers"]
        ports = {one.get("name"): one["containerPort"] for one in container.get("ports", [])}
        if ports.get("serve") != port:
            problems.append(
                f"{pod.name}: the port `serve` is {ports.get('serve')}, but http_options.port is {port}"
            )
        wanted = METRICS if pod.role == "head" else {8080}
        if missing := wanted - set(ports.values()):
            problems.append(f"{pod.name}: it lacks the metrics ports {sorted(missing)}")
    if ray_service(manifests)["spec"].get("excludeHeadPodFromServeSvc") is not True:
        problems.append("the head receives requests; set excludeHeadPodFromServeSvc to true")
    return problems


def check_monitoring(manifests: Manifests) -> list[str]:
    """Checks that Prometheus scrapes every pod, and that rules and dashboard equal k8s/monitoring."""
    monitors = of_kind(manifests, "PodMonitor")
    if not monitors:
        return []
    problems = []
    ray = [pod for pod in pods(manifests) if pod.name.startswith("RayService")]
    for monitor in monitors:
        spec = monitor["spec"]
        selected = [pod for pod in ray if pod.is_selected(spec["selector"])]
        if not selected:
            problems.append(f"{name_of(monitor)}: its selector matches no pod")
        for pod in selected:
            names = {one.get("name") for one in pod.spec["containers"][0].get("ports", [])}
            missing = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} - names
            problems += [f"{name_of(monitor)}: {pod.name} has no port {port}" for port in sorted(missing)]
    for pod in ray:
        if not any(pod.is_selected(monitor["spec"]["selector"]) for monitor in monitors):
            problems.append(f"{pod.name}: no PodMonitor selects it")
        rules = _rules(of_kind(manifests, "NetworkPolicy"), pod, "ingress")
        if not any(8080 in _ports(rule) and _is_other(rule) for rule in rules):
            problems.append(f"{pod.name}: Prometheus cannot reach its metrics")
    if [one["spec"] for one in of_kind(manifests, "PrometheusRule")] != [alerts()]:
        problems.append("the PrometheusRule differs from alerts.yaml; run `make alerts`")
    boards = [
        one for one in of_kind(manifests, "ConfigMap") if "grafana_dashboard" in one["metadata"]["labels"]
    ]
    dashboard = (K8S / "monitoring/dashboard.json").read_text()
    if [list(one["data"].values()) for one in boards] != [[dashboard]]:
        problems.append("the dashboard differs from dashboard.json")
    return problems


@cache
def alerts() -> dict[str, Any]:
    """Returns the contents of alerts.yaml."""
    found: dict[str, Any] = yaml.safe_load((K8S / "monitoring/alerts.yaml").read_text())
    return found


def check_queue(manifests: Manifests) -> list[str]:
    """Checks that the Kueue queue of the RayService exists and admits added pods."""
    label = ray_service(manifests)["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    queues = {one["metadata"]["name"] for one in of_kind(manifests, "LocalQueue")}
    if {label} - {None} != queues:
        return [f"the RayService names the queue {label}, but the LocalQueues are {sorted(queues)}"]
    elastic = ray_service(manifests)["metadata"].get("annotations", {}).get("kueue.x-k8s.io/elastic-job")
    if label and elastic != "true":
        return ["Kueue rejects added pods; set the annotation kueue.x-k8s.io/elastic-job to true"]
    return []


def check_names(manifests: Manifests) -> list[str]:
    """Checks that every resource is in the namespace glm-image, occurs once and is meant to be applied."""
    problems = []
    seen = set()
    for manifest in manifests:
        name = name_of(manifest)
        if name in seen:
            problems.append(f"{name}: it occurs twice")
        seen.add(name)
        if manifest["kind"] != "Namespace" and manifest["metadata"].get("namespace") != "glm-image":
            problems.append(f"{name}: it is in another namespace")
        if name == "ConfigMap serve-configs":
            problems.append(f"{name}: an overlay must drop it after copying from it")
    return problems


CHECKS: tuple[Callable[[Manifests], list[str]], ...] = (
    check_schemas,
    *serving.CHECKS,
    check_security,
    check_secrets,
    check_network,
    check_disruption,
    check_probes,
    check_ports,
    check_monitoring,
    check_queue,
    check_names,
)


def problems_of(manifests: Manifests) -> list[str]:
    """Returns the problems of an overlay. If a schema is violated, returns those violations only."""
    return check_schemas(manifests) or [problem for check in CHECKS for problem in check(manifests)]
