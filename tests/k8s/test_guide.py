"""Tests of the operator's guide: the files, keys and metrics it names exist, and it covers every alert."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from deployments.config import DecoderConfig, PriorConfig
from serve_app.config import AppConfig
from serve_app.observability import metrics
from tests.k8s.checks import alerts
from tests.k8s.manifests import (
    K8S,
    ROOT,
    Manifests,
    build,
    cluster,
    kustomization,
    needs_kustomize,
    of_kind,
    overlay,
    pods,
    ray_service,
)
from tests.k8s.serving import edges, image_tag

GUIDE = (K8S / "README.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
QUOTED = re.findall(r"`([^`\n]+)`", GUIDE)


def section(title: str) -> str:
    """Returns the text below a heading of the third level."""
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^#|\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    return str(text)


def test_every_alert_has_a_section_and_there_are_no_others() -> None:
    rules = [rule["alert"] for group in alerts()["groups"] for rule in group["rules"]]
    assert re.findall(r"^### (.+)$", GUIDE, re.MULTILINE) == rules
    for rule in rules:
        assert len(section(rule)) > 200, rule


def test_every_named_file_exists() -> None:
    paths = {
        word
        for text in [*QUOTED, *COMMANDS]
        for word in re.findall(r"\b(?:k8s|configs|tests)/[\w./-]*\w", text)
    }
    assert len(paths) > 12
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_overlay_and_component_is_named() -> None:
    for folder in [*(K8S / "overlays").iterdir(), *(K8S / "components").iterdir()]:
        assert f"`{folder.relative_to(ROOT)}/`" in GUIDE, folder


def test_applied_folders_are_kustomizations() -> None:
    applied = {path for block in COMMANDS for path in re.findall(r"(?:-k|kustomize) (\S+)", block)}
    assert applied == {"k8s/models", "k8s/overlays/site", "k8s/overlays/dev"}
    for path in applied:
        assert (ROOT / path / "kustomization.yaml").exists()


def test_links_have_a_target() -> None:
    for file, anchor in re.findall(r"\]\(((?!http)[^)#]*)(?:#([^)]*))?\)", GUIDE):
        target = (K8S / file) if file else K8S / "README.md"
        assert target.exists(), file
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor


def test_named_configuration_keys_exist() -> None:
    models: dict[str, type[BaseModel]] = {"prior": PriorConfig, "decoder": DecoderConfig}
    named = {word for word in QUOTED if re.fullmatch(r"[a-z_]+\.[a-z_.]+[a-z]", word)}
    named = {
        word for word in named if word.partition(".")[0] in models.keys() | AppConfig.model_fields.keys()
    }
    assert len(named) > 10
    for word in named:
        first, *path = word.split(".")
        model = models.get(first) or described_by(AppConfig, first)
        for name in path:
            assert model, word
            assert name in model.model_fields, word
            model = described_by(model, name)


def described_by(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Returns the Pydantic model of a field, or None."""
    annotation = model.model_fields[name].annotation
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def test_named_metrics_exist() -> None:
    named = set(re.findall(r"ray_image_server_\w+", GUIDE))
    assert len(named) > 8
    assert named <= {metric.exported_as for metric in metrics.ALL}


def test_the_image_has_the_tag_of_the_lock() -> None:
    tags = re.findall(r"glm-image-server:([\w.-]+)", GUIDE)
    assert set(tags) == {image_tag(), f"{image_tag()}-cpu"}
    assert re.findall(r"newTag: (\S+)", GUIDE) == [image_tag()]


@needs_kustomize
def test_created_secrets_are_the_ones_that_manifests_read() -> None:
    made = set(re.findall(r"create secret generic (\S+)", GUIDE))
    text = yaml.safe_dump_all([*site(), *build(K8S / "models")])
    read = set(re.findall(r"secret(?:Ref|KeyRef):\n(?:\s+key: \S+\n)?\s+name: (\S+)", text))
    assert made == read
    for variable in ("PGHOST", "PGUSER", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert f"={variable}=" in GUIDE


@needs_kustomize
def test_names_in_commands_exist_in_the_manifests() -> None:
    components = {pod.labels["app.kubernetes.io/component"] for pod in pods(site())}
    named = set(re.findall(r"app\.kubernetes\.io/component=(\w+)", GUIDE))
    assert named
    assert named <= components
    assert set(re.findall(r"--namespace (\S+)", GUIDE)) - {"kuberay-operator"} == {"glm-image"}
    policies = {policy["metadata"]["name"] for policy in of_kind(site(), "NetworkPolicy")}
    assert set(re.findall(r"NetworkPolicy `([\w-]+)`", GUIDE)) <= policies


@needs_kustomize
def test_timeouts_equal_those_of_the_manifests() -> None:
    manifests = site()
    text = ray_service(manifests)["spec"]["serveConfigV2"] + yaml.safe_dump_all(manifests)
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| ([^|]+) \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 5
    for number, where in rows:
        names = re.findall(r"`([A-Za-z_.]+)`", where)
        for name in names:
            last = name.rpartition(".")[2]
            values = re.findall(rf"{last}:? *(?:&\w+ )?(\d+)|{last}\n +value: '(\d+)'", text)
            assert number in {value for pair in values for value in pair}, name
        assert names or {one for _, one in edges(manifests)} == {float(number)}


@needs_kustomize
@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))
def test_an_overlay_with_its_additions_can_be_built(block: str, tmp_path: Path) -> None:
    file = kustomization(tmp_path, "site")
    file.write_text(file.read_text() + block)
    assert cluster(build(tmp_path)) != cluster(site())


def site() -> Manifests:
    manifests: Manifests = json.loads(overlay("site"))
    return manifests
