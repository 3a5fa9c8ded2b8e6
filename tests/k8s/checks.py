"""Whether manifests keep to what this project promises of them: each check returns problems, in words.

The same checks pass on k8s/ as it is and catch the mistakes of `tests.k8s.test_mutations`.
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
"""What variables are called that hold secrets."""
SECRETS = {"glm-image-api-keys", "glm-image-database", "glm-image-s3"}
"""What the ingress alone may read."""
METRICS = {8080, 44217, 44227}
HEAD_ONLY = {8265, 6379, 10001}
"""Ports by which a cluster is controlled. From outside the operator alone needs one, the first."""
INFERENCE = re.compile(r"/(v1|fal|queue|api|glm-image)\b")
PSA = "pod-security.kubernetes.io/enforce"


def check_security(manifests: Manifests) -> list[str]:
    """Whether containers run with as little as they need."""
    problems = []
    for pod in pods(manifests):
        spec, whole = pod.spec, pod.spec.get("securityContext", {})
        problems += [f"{pod.name}: {one}" for one in ("hostNetwork", "hostPID", "hostIPC") if spec.get(one)]
        problems += [f"{pod.name}: a hostPath volume" for one in spec.get("volumes", []) if "hostPath" in one]
        if pod.role != "head" and spec.get("automountServiceAccountToken") is not False:
            problems.append(f"{pod.name}: it has a service account's token")
        for container in pod.containers:
            context = whole | container.get("securityContext", {})
            problems += _context(f"{pod.name}: {container['name']}", context)
            if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
                problems.append(f"{pod.name}: {container['name']} runs as root")
            if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
                problems.append(f"{pod.name}: {container['name']} has no seccomp profile")
            if not container["resources"].get("limits", {}).get("memory"):
                problems.append(f"{pod.name}: {container['name']} has no limit of memory")
    autoscaler = cluster(manifests).get("autoscalerOptions", {})
    problems += _context("the autoscaler", autoscaler.get("securityContext", {}))
    for namespace in of_kind(manifests, "Namespace"):
        if namespace["metadata"].get("labels", {}).get(PSA) not in ("baseline", "restricted"):
            problems.append(f"{name_of(namespace)}: privileged pods are let in")
    return problems


def _context(who: str, context: dict[str, Any]) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{who} may escalate its privileges"
    if context.get("privileged"):
        yield f"{who} is privileged"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield f"{who} keeps capabilities"
    if context.get("capabilities", {}).get("add"):
        yield f"{who} adds capabilities"


def check_secrets(manifests: Manifests) -> list[str]:
    """Whether there is no secret in the manifests, and each goes where it is needed alone."""
    problems = [f"{name_of(one)}: secrets are not committed" for one in of_kind(manifests, "Secret")]
    for pod in pods(manifests):
        for container in pod.containers:
            for name, value in variables(container).items():
                if value and SECRET.search(name):
                    problems.append(f"{pod.name}: {name} stands there in the clear")
            read = set(_secrets_of(container))
            if pod.role != "ingress" and read & SECRETS:
                problems.append(f"{pod.name}: it has {', '.join(sorted(read & SECRETS))}")
            if pod.role in groups(manifests) and "huggingface" in read:
                problems.append(f"{pod.name}: it has the Hub's token")
    password = cluster(manifests).get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    if "value" in password:
        problems.append("gcsFaultToleranceOptions.redisPassword stands there in the clear")
    if cluster(manifests).get("authOptions", {}).get("mode") != "token":
        problems.append("Ray asks for no token: authOptions.mode")
    return problems + list(_keys(manifests))


def _secrets_of(container: dict[str, Any]) -> Iterator[str]:
    for one in container.get("envFrom", []):
        if "secretRef" in one:
            yield one["secretRef"]["name"]
    for one in container.get("env", []):
        if "secretKeyRef" in one.get("valueFrom", {}):
            yield one["valueFrom"]["secretKeyRef"]["name"]


def _keys(manifests: Manifests) -> Iterator[str]:
    """Whether the ingress can know the keys, the database and the object store of the configuration."""
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
            yield f"{ingress.name}: it lacks the Secret {name}"


def check_network(manifests: Manifests) -> list[str]:
    """Whether pods reach one another and what they need, and nobody else reaches them."""
    problems: list[str] = []
    policies = of_kind(manifests, "NetworkPolicy")
    if not any(
        one["spec"]["podSelector"] == {}
        and set(one["spec"].get("policyTypes", [])) == {"Ingress", "Egress"}
        and not one["spec"].get("ingress")
        and not one["spec"].get("egress")
        for one in policies
    ):
        problems.append("no NetworkPolicy denies what is not allowed")
    everybody = list(pods(manifests))
    for policy in policies:
        name, spec = name_of(policy), policy["spec"]
        selected = [pod for pod in everybody if pod.is_selected(spec["podSelector"])]
        if not selected and "redis-cleanup" not in json.dumps(spec["podSelector"]):
            problems.append(f"{name}: it selects no pod")
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
        yield "it is open to all"
    for peer in peers:
        if peer == {} or peer.get("namespaceSelector") == {} or peer.get("podSelector") == {}:
            yield "it is open to all"
        block = peer.get("ipBlock")
        if block and (side == "from" or not rule.get("ports")):
            yield f"it is open to all of {block['cidr']}"
        if "namespaceSelector" in peer and not rule.get("ports"):
            yield "another namespace reaches all ports"


def _from_outside(rule: dict[str, Any], ports: set[int]) -> Iterator[str]:
    is_operator = "kuberay-operator" in json.dumps(rule["from"])
    for port in sorted(ports & HEAD_ONLY):
        if not (is_operator and port == 8265):
            yield f"another namespace reaches the port {port}, which controls the cluster"


def _reaches(manifests: Manifests, policies: Manifests) -> Iterator[str]:
    """What must be able to reach what."""
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
                yield f"{pod.name}: the gateway cannot reach the port {port}"


def _ports(rule: dict[str, Any]) -> set[int]:
    return {port["port"] for port in rule.get("ports", [])}


def _is_other(rule: dict[str, Any]) -> bool:
    return any("namespaceSelector" in peer for peer in rule.get("from", []))


def _rules(policies: Manifests, pod: Pod, direction: str) -> Iterator[dict[str, Any]]:
    for policy in policies:
        if pod.is_selected(policy["spec"]["podSelector"]):
            yield from policy["spec"].get(direction, [])


def _may(policies: Manifests, client: Pod, server: Pod) -> bool:
    """Whether both sides let all connections through."""
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
    """Whether evictions leave an ingress, and the head where there is no other way back."""
    problems = []
    everybody = list(pods(manifests))
    protected: dict[str, Any] = {}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        spec = budget["spec"]
        selected = [pod for pod in everybody if pod.is_selected(spec["selector"])]
        if not selected:
            problems.append(f"{name_of(budget)}: it selects no pod")
        # Of what is neither a Deployment nor its like Kubernetes does not know how many there are to be.
        if not isinstance(spec.get("minAvailable"), int) or "maxUnavailable" in spec:
            problems.append(f"{name_of(budget)}: for Ray's pods minAvailable counts alone, as a number")
        protected |= {pod.role: spec.get("minAvailable") for pod in selected}
    ingress = next(group for group in groups(manifests).values() if "ingress" in group.get("resources", {}))
    least = ingress.get("minReplicas") or 0
    if least > 1 and "ingress" not in protected:
        problems.append("all ingresses may be evicted at a time")
    if isinstance(protected.get("ingress"), int) and protected["ingress"] >= least:
        problems.append("no ingress may be evicted, and its node not be drained")
    survives = "gcsFaultToleranceOptions" in cluster(manifests)
    if survives and "head" in protected:
        problems.append("the head's node cannot be drained, though the cluster would survive it")
    if least > 1 and not survives and "head" not in protected:
        problems.append("the head may be evicted, and the cluster with it")
    return problems


def check_probes(manifests: Manifests) -> list[str]:
    """Whether KubeRay's own probes stand, or such that loading a model or a busy moment does not fail."""
    problems = []
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
                probe = container.get(kind)
                if probe is None or not pod.name.startswith("RayService"):
                    continue
                if INFERENCE.search(json.dumps(probe)):
                    problems.append(f"{pod.name}: {kind} makes images")
                patience = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
                if probe.get("timeoutSeconds", 1) < 2 or (kind == "livenessProbe" and patience < 60):
                    problems.append(f"{pod.name}: {kind} is stricter than KubeRay's")
    return problems


def check_ports(manifests: Manifests) -> list[str]:
    """Whether ports have the names and numbers by which others look for them."""
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
                f"{pod.name}: the port `serve` is {ports.get('serve')}, the configuration's {port}"
            )
        wanted = METRICS if pod.role == "head" else {8080}
        if missing := wanted - set(ports.values()):
            problems.append(f"{pod.name}: it has no ports {sorted(missing)} for metrics")
    if ray_service(manifests)["spec"].get("excludeHeadPodFromServeSvc") is not True:
        problems.append("requests go by the head: excludeHeadPodFromServeSvc")
    return problems


def check_monitoring(manifests: Manifests) -> list[str]:
    """Whether every pod's metrics are fetched, and rules and dashboard are those of k8s/monitoring."""
    monitors = of_kind(manifests, "PodMonitor")
    if not monitors:
        return []
    problems = []
    ray = [pod for pod in pods(manifests) if pod.name.startswith("RayService")]
    for monitor in monitors:
        spec = monitor["spec"]
        selected = [pod for pod in ray if pod.is_selected(spec["selector"])]
        if not selected:
            problems.append(f"{name_of(monitor)}: it selects no pod")
        for pod in selected:
            names = {one.get("name") for one in pod.spec["containers"][0].get("ports", [])}
            missing = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} - names
            problems += [f"{name_of(monitor)}: {pod.name} has no port {port}" for port in sorted(missing)]
    for pod in ray:
        if not any(pod.is_selected(monitor["spec"]["selector"]) for monitor in monitors):
            problems.append(f"{pod.name}: nobody fetches its metrics")
        rules = _rules(of_kind(manifests, "NetworkPolicy"), pod, "ingress")
        if not any(8080 in _ports(rule) and _is_other(rule) for rule in rules):
            problems.append(f"{pod.name}: Prometheus cannot reach its metrics")
    if [one["spec"] for one in of_kind(manifests, "PrometheusRule")] != [alerts()]:
        problems.append("the PrometheusRule is not what alerts.yaml says: run `make alerts`")
    boards = [
        one for one in of_kind(manifests, "ConfigMap") if "grafana_dashboard" in one["metadata"]["labels"]
    ]
    dashboard = (K8S / "monitoring/dashboard.json").read_text()
    if [list(one["data"].values()) for one in boards] != [[dashboard]]:
        problems.append("the dashboard is not that of dashboard.json")
    return problems


@cache
def alerts() -> dict[str, Any]:
    """What alerts.yaml has."""
    found: dict[str, Any] = yaml.safe_load((K8S / "monitoring/alerts.yaml").read_text())
    return found


def check_queue(manifests: Manifests) -> list[str]:
    """Whether the queue that the RayService is to wait in is there."""
    label = ray_service(manifests)["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    queues = {one["metadata"]["name"] for one in of_kind(manifests, "LocalQueue")}
    if {label} - {None} != queues:
        return [f"the queue is {label}, and there are {sorted(queues)}"]
    elastic = ray_service(manifests)["metadata"].get("annotations", {}).get("kueue.x-k8s.io/elastic-job")
    if label and elastic != "true":
        return ["Kueue lets no pod be added to a cluster that is not elastic"]
    return []


def check_names(manifests: Manifests) -> list[str]:
    """Whether everything is in one namespace, once, and nothing is there that is not meant to be applied."""
    problems = []
    seen = set()
    for manifest in manifests:
        name = name_of(manifest)
        if name in seen:
            problems.append(f"{name} is there twice")
        seen.add(name)
        if manifest["kind"] != "Namespace" and manifest["metadata"].get("namespace") != "glm-image":
            problems.append(f"{name}: it is in another namespace")
        if name == "ConfigMap serve-configs":
            problems.append(f"{name}: an overlay drops it when it has copied from it")
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
    """What is wrong with an overlay; where fields are not as they must be, that alone."""
    return check_schemas(manifests) or [problem for check in CHECKS for problem in check(manifests)]
