"""Planted mistakes: the checks that pass on the real manifests must catch each, and say what it is."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.k8s.checks import problems_of
from tests.k8s.manifests import (
    Manifest,
    Manifests,
    cluster,
    compose,
    groups,
    named,
    needs_kustomize,
    of_kind,
    overlay,
    ray_service,
)

pytestmark = needs_kustomize
Mistake = Callable[[Manifests], object]


def spec(manifests: Manifests, group: str) -> dict[str, Any]:
    """Of a worker group's pods, or the head's."""
    owner = cluster(manifests)["headGroupSpec"] if group == "head" else groups(manifests)[group]
    found: dict[str, Any] = owner["template"]["spec"]
    return found


def container(manifests: Manifests, group: str) -> dict[str, Any]:
    found: dict[str, Any] = spec(manifests, group)["containers"][0]
    return found


def labels(manifests: Manifests, group: str) -> dict[str, str]:
    found: dict[str, str] = groups(manifests)[group]["template"]["metadata"]["labels"]
    return found


def policy(manifests: Manifests, name: str) -> dict[str, Any]:
    found: dict[str, Any] = named(manifests, "NetworkPolicy", name)["spec"]
    return found


def route(manifests: Manifests) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(manifests, "HTTPRoute")[0]["spec"]["rules"][0]
    return found


def annotations(manifests: Manifests) -> dict[str, str]:
    found: dict[str, str] = of_kind(manifests, "Ingress")[0]["metadata"]["annotations"]
    return found


def configured(change: Callable[[dict[str, Any]], object]) -> Mistake:
    """A mistake in the application's configuration."""

    def make(manifests: Manifests) -> None:
        whole = ray_service(manifests)["spec"]
        file = yaml.safe_load(whole["serveConfigV2"])
        change(file)
        whole["serveConfigV2"] = yaml.safe_dump(file)

    return make


def args(file: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = file["applications"][0]["args"]
    return found


def decoder(file: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = args(file)["models"][0]["decoder"]
    return found


def set_env(part: dict[str, Any], name: str, value: str) -> None:
    part["env"] = [one for one in part["env"] if one["name"] != name] + [{"name": name, "value": value}]


def secret(name: str, key: str) -> dict[str, Any]:
    return {"name": key.upper(), "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def without(manifests: Manifests, kind: str, name: str) -> None:
    manifests.remove(named(manifests, kind, name))


A_SECRET: Manifest = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "glm-image-api-keys", "namespace": "glm-image"},
    "stringData": {"GLM_IMAGE_KEY": "abc"},
}

MISTAKES: dict[str, tuple[Mistake, str]] = {
    # What schemas catch.
    "a misspelt field of the RayService": (
        lambda m: ray_service(m)["spec"].update(excludeHeadPodFromServeService=True),
        "'excludeHeadPodFromServeService' was unexpected",
    ),
    "a misspelt field of a worker group": (
        lambda m: groups(m)["prior"].update(minReplica=0),
        "'minReplica' was unexpected",
    ),
    "a misspelt field in a container": (
        lambda m: container(m, "decoder").update(volumeMount=[]),
        "'volumeMount' was unexpected",
    ),
    "a text where a number is wanted": (
        lambda m: groups(m)["decoder"].update(maxReplicas="8"),
        "'8' is not of type 'integer'",
    ),
    "a number where a text is wanted": (
        lambda m: groups(m)["decoder"].update(resources={"decoder": 1}),
        "1 is not of type 'string'",
    ),
    "an unknown kind of authentication": (
        lambda m: cluster(m).update(authOptions={"mode": "tokens"}),
        "'tokens' is not one of",
    ),
    "a misspelt field of a PodDisruptionBudget": (
        lambda m: named(m, "PodDisruptionBudget", "ingress")["spec"].update(minAvailible=1),
        "'minAvailible' was unexpected",
    ),
    "a misspelt field of a NetworkPolicy": (
        lambda m: policy(m, "gateway")["ingress"][0].update(port=[]),
        "'port' was unexpected",
    ),
    "a misspelt field of the HTTPRoute": (
        lambda m: route(m).update(timeout={}),
        "unexpected field spec.rules.timeout",
    ),
    "a wrong type in the HTTPRoute": (
        lambda m: route(m)["timeouts"].update(request="660"),
        "must match pattern",
    ),
    "a misspelt field of a PodMonitor": (
        lambda m: of_kind(m, "PodMonitor")[0]["spec"]["podMetricsEndpoints"][0].update(intervall="1s"),
        "unexpected field spec.podMetricsEndpoints.intervall",
    ),
    "a PodMonitor without a selector": (
        lambda m: of_kind(m, "PodMonitor")[0]["spec"].pop("selector"),
        "must have required property selector",
    ),
    "a version that Kubernetes has no more": (
        lambda m: named(m, "PodDisruptionBudget", "ingress").update(apiVersion="policy/v1beta1"),
        "has no policy/v1beta1",
    ),
    # The configuration.
    "a configuration that is no YAML": (
        lambda m: ray_service(m)["spec"].update(serveConfigV2="a: ]"),
        "serveConfigV2: while parsing",
    ),
    "a misspelt key of Ray Serve's": (
        configured(lambda file: file["applications"][0].update(route_prefx="/")),
        "route_prefx",
    ),
    "a misspelt key of ours": (configured(lambda file: args(file).update(limit={})), "limit: Extra inputs"),
    "an unknown option of a deployment": (
        configured(lambda file: decoder(file)["deployment"].update(num_replica=2)),
        "num_replica",
    ),
    "whoever comes may use it": (
        configured(lambda file: args(file).update(auth={"open": True})),
        "whoever reaches the port may use the server",
    ),
    "listening to itself alone": (
        configured(lambda file: file["http_options"].update(host="127.0.0.1")),
        "nobody reaches a pod's 127.0.0.1",
    ),
    "refusing to start without GPUs": (
        configured(lambda file: args(file)["cluster"].update(autoscaling=False)),
        "cluster.autoscaling is not what the cluster does",
    ),
    "two ingresses on SQLite": (
        configured(lambda file: args(file).update(database={"url": "sqlite:///jobs.db"})),
        "several ingress replicas need a database.url of PostgreSQL",
    ),
    # Versions.
    "another Ray than the lock's": (lambda m: cluster(m).update(rayVersion="2.59.0"), "rayVersion is 2.59.0"),
    "an image of another Ray than the lock's": (
        lambda m: container(m, "decoder").update(image="glm-image-server:0.1.0-ray2.59.0"),
        "the tag 0.1.0-ray2.59.0 is not the lock's",
    ),
    "workers of another image than the head": (
        lambda m: container(m, "decoder").update(image=f"{container(m, 'decoder')['image']}-cpu"),
        "Ray's containers have several images",
    ),
    "an image of no certain version": (
        lambda m: of_kind(m, "StatefulSet")[0]["spec"]["template"]["spec"]["containers"][0].update(
            image="redis:latest"
        ),
        "redis:latest is not of a certain version",
    ),
    # Places and numbers.
    "a group whose pods have no GPU": (
        lambda m: container(m, "decoder")["resources"]["limits"].pop("nvidia.com/gpu"),
        "glm-image-decoder fits no pod of any group",
    ),
    "a replica of more GPUs than a pod has": (
        configured(lambda file: decoder(file)["deployment"]["ray_actor_options"].update(num_gpus=2)),
        "glm-image-decoder fits no pod of any group",
    ),
    "a stage that may land anywhere": (
        configured(lambda file: decoder(file)["deployment"]["ray_actor_options"].pop("resources")),
        "glm-image-decoder may land in prior or decoder",
    ),
    "an ingress that may land on a GPU": (
        configured(lambda file: args(file)["ingress"]["deployment"]["ray_actor_options"].pop("resources")),
        "Ingress may land in",
    ),
    "more replicas than pods": (
        configured(lambda file: decoder(file).update(max_replicas=9)),
        "max_replicas is above maxReplicas",
    ),
    "fewer pods than replicas": (
        lambda m: groups(m)["decoder"].update(maxReplicas=7),
        "max_replicas is above maxReplicas",
    ),
    "fewer pods than there always are ingresses": (
        lambda m: groups(m)["ingress"].update(minReplicas=1),
        "Ingress always has 2 replicas",
    ),
    "a group that nobody uses": (
        lambda m: cluster(m)["workerGroupSpecs"].append(
            copy.deepcopy(groups(m)["prior"]) | {"groupName": "spare", "resources": {"spare": "1"}}
        ),
        "the group spare has no deployment",
    ),
    "a head that works": (
        lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "it has CPUs for work",
    ),
    "a group without a minimum": (
        lambda m: groups(m)["prior"].pop("minReplicas"),
        "'minReplicas' is a required property",
    ),
    "GPUs that are paid for without work": (
        lambda m: groups(m)["prior"].update(minReplicas=1),
        "it costs GPUs without work",
    ),
    "no room for another ingress while one is drained": (
        lambda m: groups(m)["ingress"].update(maxReplicas=2),
        "no pod can take over",
    ),
    "no autoscaler": (lambda m: cluster(m).pop("enableInTreeAutoscaling"), "the cluster does not scale"),
    "the old autoscaler": (
        lambda m: cluster(m)["autoscalerOptions"].update(version="v1"),
        "autoscalerOptions.version is not v2",
    ),
    # Timeouts, sizes and headers.
    "a replica that is killed before its request must end": (
        configured(lambda file: decoder(file)["deployment"].update(graceful_shutdown_timeout_s=500)),
        "limits.deadline_s 580 is not below graceful_shutdown_timeout_s of glm-image-decoder 500",
    ),
    "a deadline that nobody waits for": (
        configured(lambda file: args(file)["limits"].update(deadline_s=610)),
        "limits.deadline_s 610 is not below",
    ),
    "a gateway that gives up first": (
        lambda m: route(m)["timeouts"].update(request="300s"),
        "is not below request of HTTPRoute glm-image 300",
    ),
    "a gateway with its default timeout": (
        lambda m: route(m).pop("timeouts"),
        "is not below backendRequest of HTTPRoute glm-image 15",
    ),
    "a pod that is killed while it is drained": (
        lambda m: spec(m, "ingress").update(terminationGracePeriodSeconds=600),
        "is not below terminationGracePeriodSeconds 600",
    ),
    "a pod with Kubernetes' default grace": (
        lambda m: spec(m, "decoder").pop("terminationGracePeriodSeconds"),
        "is not below terminationGracePeriodSeconds 30",
    ),
    "a node that is drained too fast": (
        lambda m: set_env(container(m, "prior"), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30"),
        "draining leaves no 60 seconds",
    ),
    "an old cluster that goes before its requests": (
        lambda m: ray_service(m)["spec"].pop("rayClusterDeletionDelaySeconds"),
        "is not below rayClusterDeletionDelaySeconds 60",
    ),
    "headers that Ray's proxy obeys": (
        lambda m: route(m).pop("filters"),
        "lets x-request-timeout-seconds through",
    ),
    "a route to another port": (
        lambda m: route(m)["backendRefs"][0].update(port=8265),
        "leads to glm-image-serve-svc:8265",
    ),
    # Models.
    "weights that stages could change": (
        lambda m: container(m, "decoder")["volumeMounts"][0].update(readOnly=False),
        "/models is mounted to be written to",
    ),
    "a claim that is attached to be written to": (
        lambda m: spec(m, "prior")["volumes"][0]["persistentVolumeClaim"].pop("readOnly"),
        "/models is mounted to be written to",
    ),
    "weights somewhere else": (
        lambda m: container(m, "prior")["volumeMounts"][0].update(mountPath="/data"),
        "there is no volume with /models/GLM-Image",
    ),
    "stages that ask the Hub": (
        lambda m: set_env(container(m, "prior"), "HF_HUB_OFFLINE", "0"),
        "it may ask the Hub",
    ),
    # Security.
    "a container of root's": (
        lambda m: spec(m, "decoder")["securityContext"].update(runAsUser=0),
        "runs as root",
    ),
    "a container that may be root's": (
        lambda m: spec(m, "head")["securityContext"].pop("runAsNonRoot"),
        "runs as root",
    ),
    "escalation of privileges": (
        lambda m: container(m, "decoder")["securityContext"].update(allowPrivilegeEscalation=True),
        "may escalate its privileges",
    ),
    "an autoscaler that may do more than it needs": (
        lambda m: cluster(m)["autoscalerOptions"].pop("securityContext"),
        "the autoscaler may escalate its privileges",
    ),
    "kept capabilities": (
        lambda m: container(m, "ingress")["securityContext"].pop("capabilities"),
        "keeps capabilities",
    ),
    "added capabilities": (
        lambda m: container(m, "ingress")["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "adds capabilities",
    ),
    "a privileged container": (
        lambda m: container(m, "decoder")["securityContext"].update(privileged=True),
        "is privileged",
    ),
    "no seccomp profile": (
        lambda m: spec(m, "prior")["securityContext"].pop("seccompProfile"),
        "has no seccomp profile",
    ),
    "the host's network": (lambda m: spec(m, "ingress").update(hostNetwork=True), "hostNetwork"),
    "the host's files": (
        lambda m: spec(m, "decoder")["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "a hostPath volume",
    ),
    "a service account's token on workers": (
        lambda m: spec(m, "decoder").pop("automountServiceAccountToken"),
        "it has a service account's token",
    ),
    "memory without a limit": (
        lambda m: container(m, "ingress")["resources"]["limits"].pop("memory"),
        "has no limit of memory",
    ),
    "a namespace that lets everything in": (
        lambda m: named(m, "Namespace", "glm-image")["metadata"].pop("labels"),
        "privileged pods are let in",
    ),
    # Secrets.
    "a Secret": (lambda m: m.append(copy.deepcopy(A_SECRET)), "secrets are not committed"),
    "a key in the clear": (
        lambda m: set_env(container(m, "ingress"), "GLM_IMAGE_KEY", "abc"),
        "GLM_IMAGE_KEY stands there in the clear",
    ),
    "Redis's password in the clear": (
        lambda m: cluster(m)["gcsFaultToleranceOptions"].update(redisPassword={"value": "abc"}),
        "redisPassword stands there in the clear",
    ),
    "the Hub's token on workers": (
        lambda m: container(m, "decoder")["env"].append(secret("huggingface", "token")),
        "it has the Hub's token",
    ),
    "the database's password on GPUs": (
        lambda m: container(m, "decoder").update(envFrom=[{"secretRef": {"name": "glm-image-database"}}]),
        "it has glm-image-database",
    ),
    "an ingress without its keys": (
        lambda m: container(m, "ingress")["envFrom"].pop(0),
        "it lacks the Secret glm-image-api-keys",
    ),
    "a cluster without a token": (lambda m: cluster(m).pop("authOptions"), "Ray asks for no token"),
    # The network.
    "nothing denied": (lambda m: without(m, "NetworkPolicy", "deny-all"), "no NetworkPolicy denies"),
    "a denial of incoming connections alone": (
        lambda m: policy(m, "deny-all").update(policyTypes=["Ingress"]),
        "no NetworkPolicy denies",
    ),
    "a policy open to all": (lambda m: policy(m, "gateway")["ingress"][0].pop("from"), "it is open to all"),
    "a policy open to every namespace": (
        lambda m: policy(m, "monitoring")["ingress"][0].update({"from": [{"namespaceSelector": {}}]}),
        "it is open to all",
    ),
    "a policy open to the world": (
        lambda m: policy(m, "gateway")["ingress"][0].update({"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
        "it is open to all of 0.0.0.0/0",
    ),
    "a way out to everywhere": (
        lambda m: policy(m, "ingress-out")["egress"][0].pop("ports"),
        "it is open to all of 0.0.0.0/0",
    ),
    "a gateway that reaches the dashboard": (
        lambda m: policy(m, "gateway")["ingress"][0]["ports"].append({"protocol": "TCP", "port": 8265}),
        "reaches the port 8265, which controls the cluster",
    ),
    "a gateway that reaches all ports": (
        lambda m: policy(m, "gateway")["ingress"][0].pop("ports"),
        "another namespace reaches all ports",
    ),
    "a gateway that reaches another port": (
        lambda m: policy(m, "gateway")["ingress"][0].update(ports=[{"protocol": "TCP", "port": 80}]),
        "the gateway cannot reach the port 8000",
    ),
    "a policy for pods that there are not": (
        lambda m: policy(m, "gateway")["podSelector"].update(matchLabels={"app": "glm-image"}),
        "NetworkPolicy gateway: it selects no pod",
    ),
    "a stage that Ray does not reach": (
        lambda m: labels(m, "decoder").update({"app.kubernetes.io/component": "painter"}),
        "cannot reach RayService glm-image: decoder",
    ),
    "no DNS": (lambda m: without(m, "NetworkPolicy", "dns"), "cannot reach DNS"),
    "no way to the database": (
        lambda m: policy(m, "ingress-out")["egress"].pop(1),
        "cannot reach the database",
    ),
    "no way to the API server": (
        lambda m: without(m, "NetworkPolicy", "autoscaler"),
        "cannot reach the API server",
    ),
    # Disruption, probes and ports.
    "a budget of no pods": (
        lambda m: named(m, "PodDisruptionBudget", "ingress")["spec"]["selector"].update(
            matchLabels={"a": "b"}
        ),
        "PodDisruptionBudget ingress: it selects no pod",
    ),
    "a budget that Kubernetes cannot count for Ray's pods": (
        lambda m: named(m, "PodDisruptionBudget", "ingress").update(
            spec={
                "maxUnavailable": 1,
                "selector": named(m, "PodDisruptionBudget", "ingress")["spec"]["selector"],
            }
        ),
        "minAvailable counts alone",
    ),
    "a budget that lets no node be drained": (
        lambda m: named(m, "PodDisruptionBudget", "ingress")["spec"].update(minAvailable=2),
        "no ingress may be evicted",
    ),
    "no budget": (
        lambda m: without(m, "PodDisruptionBudget", "ingress"),
        "all ingresses may be evicted at a time",
    ),
    "a head that may go and does not come back": (
        lambda m: cluster(m).pop("gcsFaultToleranceOptions"),
        "the head may be evicted, and the cluster with it",
    ),
    "a probe that is too strict": (
        lambda m: container(m, "decoder").update(
            livenessProbe={
                "httpGet": {"path": "/api/healthz", "port": 52365},
                "periodSeconds": 5,
                "failureThreshold": 1,
            }
        ),
        "livenessProbe is stricter than KubeRay's",
    ),
    "a probe that makes images": (
        lambda m: container(m, "ingress").update(
            readinessProbe={
                "httpGet": {"path": "/v1/images/generations", "port": 8000},
                "timeoutSeconds": 600,
            }
        ),
        "readinessProbe makes images",
    ),
    "another port than the configuration's": (
        configured(lambda file: file["http_options"].update(port=8001)),
        "the port `serve` is 8000, the configuration's 8001",
    ),
    "a head whose port nobody finds": (
        lambda m: container(m, "head")["ports"].pop(3),
        "the port `serve` is None",
    ),
    "requests by way of the head": (
        lambda m: ray_service(m)["spec"].update(excludeHeadPodFromServeSvc=False),
        "requests go by the head",
    ),
    # Monitoring and names.
    "a monitor of no pods": (
        lambda m: named(m, "PodMonitor", "glm-image-workers")["spec"]["selector"].update(
            matchLabels={"a": "b"}
        ),
        "PodMonitor glm-image-workers: it selects no pod",
    ),
    "a monitor of another port": (
        lambda m: container(m, "prior")["ports"].pop(1),
        "glm-image: prior has no port metrics",
    ),
    "metrics that Prometheus does not reach": (
        lambda m: without(m, "NetworkPolicy", "monitoring"),
        "Prometheus cannot reach its metrics",
    ),
    "an alert that is not in alerts.yaml": (
        lambda m: of_kind(m, "PrometheusRule")[0]["spec"]["groups"][0]["rules"].pop(),
        "run `make alerts`",
    ),
    "another dashboard": (
        lambda m: named(m, "ConfigMap", "glm-image-dashboard")["data"].update({"glm-image.json": "{}"}),
        "the dashboard is not that of dashboard.json",
    ),
    "something in another namespace": (
        lambda m: route_itself(m)["metadata"].update(namespace="default"),
        "HTTPRoute glm-image: it is in another namespace",
    ),
    "something twice": (
        lambda m: m.append(copy.deepcopy(route_itself(m))),
        "HTTPRoute glm-image is there twice",
    ),
}


def route_itself(manifests: Manifests) -> Manifest:
    return of_kind(manifests, "HTTPRoute")[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    plant, told = MISTAKES[mistake]
    manifests = json.loads(overlay("site"))
    plant(manifests)
    found = problems_of(manifests)
    assert any(told in problem for problem in found), found


IN_OTHER_WAYS_IN: dict[str, tuple[Mistake, str]] = {
    "bodies that are cut": (
        lambda m: annotations(m).update({"nginx.ingress.kubernetes.io/proxy-body-size": "8m"}),
        "proxy-body-size 8m is below limits.max_body_bytes",
    ),
    "nginx's default size": (
        lambda m: annotations(m).pop("nginx.ingress.kubernetes.io/proxy-body-size"),
        "proxy-body-size 1m is below limits.max_body_bytes",
    ),
    "larger bodies than nginx takes": (
        configured(lambda file: args(file)["limits"].update(max_body_bytes=2**27)),
        "proxy-body-size 64m is below limits.max_body_bytes",
    ),
    "nginx's default timeout": (
        lambda m: annotations(m).pop("nginx.ingress.kubernetes.io/proxy-read-timeout"),
        "is not below proxy-read-timeout of Ingress glm-image 60",
    ),
    "headers that Ray's proxy obeys": (
        lambda m: annotations(m).pop("nginx.ingress.kubernetes.io/configuration-snippet"),
        "Ingress glm-image: lets x-request-disconnect-disabled through",
    ),
    "another service": (
        lambda m: of_kind(m, "Ingress")[0]["spec"]["rules"][0]["http"]["paths"][0]["backend"][
            "service"
        ].update(name="glm-image-head-svc"),
        "leads to {'name': 'glm-image-head-svc'",
    ),
    "a controller that does not reach the pods": (
        lambda m: without(m, "NetworkPolicy", "ingress-nginx"),
        "the gateway cannot reach the port 8000",
    ),
    "a queue that there is not": (
        lambda m: ray_service(m)["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "images"}),
        "the queue is images, and there are ['glm-image']",
    ),
    "a queue that lets nobody be added": (
        lambda m: ray_service(m)["metadata"].pop("annotations"),
        "Kueue lets no pod be added",
    ),
    "a misspelt field of the queue": (
        lambda m: of_kind(m, "LocalQueue")[0]["spec"].update(clusterQueu="a"),
        "unexpected field spec.clusterQueu",
    ),
    "a head that may go and does not come back": (
        lambda m: without(m, "PodDisruptionBudget", "head"),
        "the head may be evicted, and the cluster with it",
    ),
    "a configuration that is left over": (
        lambda m: m.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "serve-configs", "namespace": "glm-image"},
                "data": {"cluster": ""},
            }
        ),
        "an overlay drops it",
    ),
}


@pytest.fixture(scope="module")
def other_ways_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("overlay")
    return json.dumps(compose(folder, "prod", "components/ingress-nginx", "components/kueue"))


@pytest.mark.parametrize("mistake", IN_OTHER_WAYS_IN)
def test_a_mistake_with_an_ingress_and_a_queue_is_caught(mistake: str, other_ways_in: str) -> None:
    plant, told = IN_OTHER_WAYS_IN[mistake]
    manifests = json.loads(other_ways_in)
    assert problems_of(manifests) == []
    plant(manifests)
    found = problems_of(manifests)
    assert any(told in problem for problem in found), found
