"""Tests of the manifests that kustomize builds: overlays and combined components pass all checks."""

import json
from pathlib import Path

import pytest

from serve_app import __version__
from tests.k8s.checks import CHECKS, check_security, problems_of
from tests.k8s.manifests import (
    K8S,
    PACKAGES,
    ROOT,
    Manifests,
    build,
    cluster,
    compose,
    groups,
    kustomizes,
    named,
    needs_kustomize,
    of_kind,
    overlay,
    ray_service,
    variables,
    workers,
)
from tests.k8s.schemas import check_schemas
from tests.k8s.serving import image_tag, locked, serving

OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
COMPONENTS = sorted(f"components/{folder.name}" for folder in (K8S / "components").iterdir())
pytestmark = needs_kustomize


def loaded(name: str) -> Manifests:
    manifests: Manifests = json.loads(overlay(name))
    return manifests


def test_the_overlays_exist() -> None:
    assert {"dev", "prod", "site"} <= set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_passes_every_check(name: str) -> None:
    manifests = loaded(name)
    assert len(manifests) > 5
    assert [(check.__name__, found) for check in CHECKS if (found := check(manifests))] == []


@pytest.mark.parametrize(
    "components",
    [
        ["components/gcs-ft"],
        ["components/kueue"],
        ["components/ingress-nginx", "monitoring", "components/kueue"],
        [*COMPONENTS, "monitoring"],
    ],
    ids=lambda components: "+".join(Path(component).name for component in components),
)
def test_components_can_be_combined(tmp_path: Path, components: list[str]) -> None:
    without = {(one["kind"], one["metadata"]["name"]) for one in loaded("prod")}
    manifests = compose(tmp_path, "prod", *components)
    assert problems_of(manifests) == []
    assert {(one["kind"], one["metadata"]["name"]) for one in manifests} - without


def test_components_can_be_combined_with_the_tiny_model(tmp_path: Path) -> None:
    components = ("components/gateway-api", "components/ingress-nginx", "monitoring")
    assert problems_of(compose(tmp_path, "dev", *components)) == []


def test_the_compile_cache_is_on_a_writable_volume(tmp_path: Path) -> None:
    manifests = compose(tmp_path, "prod", "components/compile-cache")
    (model,) = serving(ray_service(manifests)["spec"]["serveConfigV2"]).app.models
    claims = {claim["metadata"]["name"] for claim in of_kind(manifests, "PersistentVolumeClaim")}
    for name in ("prior", "decoder"):
        pod = groups(manifests)[name]["template"]["spec"]
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        mount = mounts[model.compile_cache.replace("~", "/home/app")]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["persistentVolumeClaim"]["claimName"] in claims
        assert not mount.get("readOnly")


def test_all_kustomize_versions_build_the_same() -> None:
    for command in kustomizes()[1:]:
        assert build(K8S / "overlays/site", command) == loaded("site"), command


def test_an_overlay_has_its_configuration_from_configs() -> None:
    for name, file in (("dev", "cluster-tiny.yaml"), ("prod", "cluster.yaml"), ("site", "cluster.yaml")):
        text = ray_service(loaded(name))["spec"]["serveConfigV2"]
        assert text == (ROOT / "configs" / file).read_text(), name


def test_max_replicas_of_pods_and_stages_are_equal() -> None:
    for name in OVERLAYS:
        manifests = loaded(name)
        (model,) = serving(ray_service(manifests)["spec"]["serveConfigV2"]).app.models
        assert groups(manifests)["prior"]["maxReplicas"] == model.prior.max_replicas
        assert groups(manifests)["decoder"]["maxReplicas"] == model.decoder.max_replicas


def test_the_job_downloads_the_checkpoint_to_the_configured_folder() -> None:
    manifests = build(K8S / "models")
    assert check_schemas(manifests) == []
    (claim,), (job,) = of_kind(manifests, "PersistentVolumeClaim"), of_kind(manifests, "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    folder = container["command"][-1]
    assert container["image"] == f"glm-image-server:{image_tag()}"
    prod = loaded("prod")
    assert folder == serving(ray_service(prod)["spec"]["serveConfigV2"]).app.models[0].checkpoint
    for pod in workers(prod):
        for volume in pod.spec.get("volumes", []):
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "ReadOnlyMany" in claim["spec"]["accessModes"]
    assert variables(container) == {"HF_TOKEN": None}
    assert check_security([*prod, job]) == []


def test_the_idle_cluster_has_no_gpus() -> None:
    for name in OVERLAYS:
        always = [group for group in groups(loaded(name)).values() if group["minReplicas"]]
        assert [group["groupName"] for group in always] == ["ingress"]
        assert "nvidia.com/gpu" not in json.dumps(always)
        assert "nvidia.com/gpu" not in json.dumps(cluster(loaded(name))["headGroupSpec"])


def test_versions_are_the_same_everywhere() -> None:
    assert locked("ray") == cluster(loaded("prod"))["rayVersion"]
    assert f'org.opencontainers.image.version="{__version__}"' in (ROOT / "Dockerfile").read_text()


def test_the_redis_address_leads_to_redis() -> None:
    service, redis = (named(loaded("site"), kind, "glm-image-redis") for kind in ("Service", "StatefulSet"))
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]
    options = cluster(loaded("site"))["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"glm-image-redis:{service['spec']['ports'][0]['port']}"


def test_installed_packages_have_the_versions_of_the_lock() -> None:
    lock = json.loads((Path(__file__).parent / "package-lock.json").read_text())
    for path, package in lock["packages"].items():
        if path and (there := Path(__file__).parent / path / "package.json").exists():
            assert json.loads(there.read_text())["version"] == package["version"]
    assert PACKAGES.exists()
