"""The shipped configurations are valid, misspelt keys are errors, and the examples in `docs/` are valid."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import TypeAdapter, ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.config import ModelConfig, PriorConfig, StageConfig
from serve_app.app import build_app
from serve_app.config import APIKey, AppConfig
from training.demo.scenes import COLOURS, SHAPES, SIZES

ROOT = Path(__file__).parents[3]
CONFIGS = [file for file in sorted((ROOT / "configs").glob("*.yaml")) if file.stem != "kustomization"]
CPU = {"device": "cpu"}
OPEN = {"auth": {"open": True}}
DOCS = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
MODEL = {"name": "m", "family": "glm_image", "checkpoint": "tiny", "prior": CPU, "decoder": CPU}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_shipped_configuration_is_valid_and_listens_on_this_machine(file: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    # A NetworkPolicy and keys protect the pods of a cluster; see tests/k8s.
    is_clusters = file.stem.startswith("cluster")
    assert config.http_options.host == ("0.0.0.0" if is_clusters else "127.0.0.1")  # noqa: S104
    (application,) = config.applications
    assert application.import_path == "serve_app.app:build_app"
    args = AppConfig.model_validate(application.args)
    assert not (is_clusters and args.auth.open)
    build_app(args)


def test_make_serve_serves_the_demo_and_describes_it() -> None:
    (file,) = re.findall("^CONFIG = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    args = yaml.safe_load((ROOT / file).read_text())["applications"][0]["args"]
    (model,) = AppConfig.model_validate(args).models
    assert (model.name, model.checkpoint) == ("glm-image", "demo")
    assert {model.prior.dtype, model.decoder.dtype} == {"float32"}
    assert model.description
    for known in ("demo", *COLOURS, *SHAPES, *SIZES):
        assert known in model.description
    assert len(model.examples) >= 4


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"checkpoit": "tiny"}, "checkpoit"),
        ({"prior": {"num_gpus": 1}}, "num_gpus"),
        ({"decoder": {"device": "cuda"}}, "needs deployment.ray_actor_options.num_gpus"),
        ({"family": "flux"}, "unknown family 'flux'; known: glm_image"),
        ({"checkpoint": "org/name", "revision": "main"}, "revision"),
        ({"decoder": {"dtype": "int4"}}, "dtype"),
        ({"decoder": {"device": "tpu"}}, "device"),
        ({"defaults": {"width": 500}}, "500x1024: each side must be a multiple of 32 from 512 to 2048"),
        ({"defaults": {"guidance_scale": float("nan")}}, "guidance_scale"),
        ({"name": "a/b"}, "name"),
        ({"examples": ["a boat", ""]}, "examples.1"),
        ({"decoder": CPU | {"min_replicas": 2}}, "min_replicas is above max_replicas"),
        ({"decoder": CPU | {"deployment": {"num_replicas": 2}}}, "num_replicas cannot be set: the stage's"),
        ({"prior": CPU | {"deployment": {"autoscaling_config": {}}}}, "autoscaling_config cannot be set"),
    ],
)
def test_a_mistake_in_a_model_is_named(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        ModelConfig.model_validate(MODEL | change)


@pytest.mark.parametrize(("old", "new"), [("rows", "max_batch_size"), ("row_tokens", "max_sequence_length")])
def test_an_old_key_of_the_prior_is_accepted_with_a_warning(old: str, new: str) -> None:
    def prior(**fields: int) -> PriorConfig:
        return AppConfig.model_validate(OPEN | {"models": [MODEL | {"prior": CPU | fields}]}).models[0].prior

    with pytest.warns(FutureWarning, match=rf"prior\.{old} is now prior\.{new}; rename it"):
        renamed = prior(**{old: 3000})
    assert renamed == prior(**{new: 3000})
    assert getattr(renamed, new) == 3000
    with pytest.raises(ValidationError, match=f"{old} is the old name of {new}; remove {old}"):
        prior(**{old: 3000, new: 3000})


def test_a_server_with_keys_only_is_not_woken_by_its_page() -> None:
    auth = {"api_keys": [{"id": "a", "sha256": "0" * 64}]}
    with pytest.raises(ValidationError, match="wake_on_open needs auth"):
        AppConfig.model_validate({"models": [MODEL], "auth": auth, "wake_on_open": True})


def test_two_models_cannot_have_one_name() -> None:
    with pytest.raises(ValidationError, match="names must be unique"):
        AppConfig.model_validate(OPEN | {"models": [MODEL, MODEL]})


def test_a_default_above_the_limits_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"default number of steps of m is above limits.max_steps"):
        AppConfig.model_validate(OPEN | {"models": [MODEL], "limits": {"max_steps": 49}})


@pytest.mark.parametrize(
    ("limits", "above"),
    [
        ({"max_pending": 9}, "limits.max_images is above limits.max_pending"),
        ({"max_pending_per_key": 9}, "limits.max_images is above limits.max_pending_per_key"),
        (
            {"megapixel_steps_per_minute": 2000},
            "limits.max_megapixel_steps is above limits.megapixel_steps_per_minute",
        ),
        ({"max_pixels": 1024 * 1023}, "default size of m is above limits.max_pixels"),
        ({"max_megapixel_steps": 52}, "default image's work of m is above limits.max_megapixel_steps"),
    ],
)
def test_limits_that_exclude_an_allowed_request_are_an_error(limits: dict[str, int], above: str) -> None:
    with pytest.raises(ValidationError, match=above):
        AppConfig.model_validate(OPEN | {"models": [MODEL], "limits": limits})


@pytest.mark.parametrize(
    ("auth", "problem"),
    [
        (None, "auth"),
        ({}, r"no api_keys: make one with `python -m serve_app keys new NAME`, or set open: true"),
        ({"api_keys": [{"id": "a"}]}, "either sha256 or secret_env"),
        ({"api_keys": [{"id": "a", "sha256": "0" * 64, "secret_env": "A"}]}, "either sha256 or secret_env"),
        ({"api_keys": [{"id": "a", "sha256": "secret"}]}, "sha256"),
        ({"api_keys": [{"id": "a b", "secret_env": "A"}]}, "id"),
        ({"api_keys": [{"id": "a", "secret_env": "A", "role": "root"}]}, "role"),
        ({"api_keys": [{"id": "a", "secret_env": "A"}, {"id": "a", "secret_env": "B"}]}, "must be unique"),
    ],
)
def test_a_server_is_open_or_has_valid_keys(auth: dict[str, Any] | None, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        AppConfig.model_validate({"models": [MODEL]} | ({} if auth is None else {"auth": auth}))


@pytest.mark.parametrize("several", [{"num_replicas": 2}, {"autoscaling_config": {"max_replicas": 3}}])
def test_several_ingress_replicas_need_postgresql(several: dict[str, Any]) -> None:
    settings = OPEN | {"models": [MODEL], "ingress": {"deployment": several}}
    with pytest.raises(ValidationError, match="PostgreSQL"):
        AppConfig.model_validate(settings)
    AppConfig.model_validate(settings | {"database": {"url": "postgresql://user@host/jobs"}})


@pytest.mark.parametrize("window", ["on", 1, 17, 2.5])
def test_a_window_of_speculation_is_bounded(window: object) -> None:
    with pytest.raises(ValidationError, match="speculation"):
        AppConfig.model_validate(OPEN | {"models": [MODEL | {"prior": CPU | {"speculation": window}}]})


def test_speculation_can_be_off_in_yaml() -> None:
    prior = CPU | yaml.safe_load("speculation: off")
    config = AppConfig.model_validate(OPEN | {"models": [MODEL | {"prior": prior}]})
    assert config.models[0].prior.speculation == "off"


def test_a_family_that_draws_no_tokens_takes_no_speculation() -> None:
    model = MODEL | {"family": "z_image", "prior": CPU | {"speculation": "off"}}
    with pytest.raises(ValidationError, match="the family z_image draws no tokens; remove it"):
        AppConfig.model_validate(OPEN | {"models": [model]})


def test_on_a_cpu_several_tokens_in_a_pass_need_weights_that_are_packed() -> None:
    model = MODEL | {"prior": CPU | {"dtype": "bfloat16", "speculation": 4}}
    with pytest.raises(ValidationError, match="need dtype: float32; set that, or remove speculation"):
        AppConfig.model_validate(OPEN | {"models": [model]})


@pytest.mark.parametrize(
    ("stage", "threads"),
    [
        ({"device": "cpu"}, 5),
        ({"device": "cpu", "cpu_threads": 2}, 2),
        ({"device": "cpu", "deployment": {"ray_actor_options": {"num_cpus": 3}}}, 3),
        ({"device": "cpu", "deployment": {"ray_actor_options": {"num_cpus": 0.5}}}, 5),
        ({"device": "cuda", "deployment": {"ray_actor_options": {"num_gpus": 1}}}, None),
    ],
    ids=str,
)
def test_a_stage_on_a_cpu_has_all_cpus_unless_told(
    monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], threads: int | None
) -> None:
    monkeypatch.setattr("deployments.config.cpu_limit", lambda: 5)
    assert StageConfig.model_validate(stage).cpu_threads == threads


@pytest.mark.parametrize(
    ("options", "autoscaling", "num_cpus"),
    [({}, False, 0), ({"resources": {"a": 1}}, False, 0), ({"num_cpus": 2}, False, 2), ({}, True, 1)],
)
def test_stages_on_a_cpu_reserve_none_unless_nodes_come_for_them(
    options: dict[str, Any], autoscaling: bool, num_cpus: float
) -> None:
    stage = CPU | {"deployment": {"ray_actor_options": options}}
    changed = {"models": [MODEL | {"prior": stage}], "cluster": {"autoscaling": autoscaling}}
    app = build_app(AppConfig.model_validate(OPEN | changed))
    bound = app._bound_deployment.init_args[1]["m"]["prior"]._bound_deployment  # type: ignore[misc]
    assert bound.ray_actor_options == {"num_cpus": num_cpus} | options


def test_an_unknown_deployment_option_is_named() -> None:
    model = MODEL | {"decoder": CPU | {"deployment": {"num_replica": 2}}}
    with pytest.raises(TypeError, match="num_replica"):
        build_app(AppConfig.model_validate(OPEN | {"models": [model]}))


def test_a_stages_deployment_options_reach_ray_serve() -> None:
    options = {"ray_actor_options": {"num_gpus": 0.5}, "graceful_shutdown_timeout_s": 60}
    decoder = {"deployment": options, "max_replicas": 7, "target_load": 3}
    app = build_app(AppConfig.model_validate(OPEN | {"models": [MODEL | {"decoder": decoder}]}))
    bound = app._bound_deployment.init_args[1]["m"]["decoder"]._bound_deployment  # type: ignore[misc]
    assert bound.ray_actor_options["num_gpus"] == 0.5
    assert bound._deployment_config.graceful_shutdown_timeout_s == 60
    assert bound._deployment_config.autoscaling_config.max_replicas == 7
    assert bound._deployment_config.autoscaling_config.target_ongoing_requests == 3


@pytest.mark.parametrize("wakes", [True, False])
def test_the_first_model_starts_with_the_server_if_it_wakes_on_open(*, wakes: bool) -> None:
    models = [MODEL, MODEL | {"name": "second"}]
    app = build_app(AppConfig.model_validate(OPEN | {"models": models, "wake_on_open": wakes}))
    stages = app._bound_deployment.init_args[1]  # type: ignore[misc]
    replicas = {
        name: {
            one._bound_deployment._deployment_config.autoscaling_config.initial_replicas
            for one in parts.values()
        }
        for name, parts in stages.items()
    }
    assert replicas == {"m": {1 if wakes else None}, "second": {None}}


@pytest.mark.parametrize(
    ("present", "autoscaling", "enough"), [(8, False, True), (7, False, False), (0, True, True)]
)
def test_a_configuration_that_asks_for_more_gpus_than_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch, present: int, autoscaling: bool, enough: bool
) -> None:
    args = yaml.safe_load((ROOT / "configs" / "eight-gpus.yaml").read_text())["applications"][0]["args"]
    config = AppConfig.model_validate(args | {"cluster": {"autoscaling": autoscaling}})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": present})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    if enough:
        build_app(config)
    else:
        with pytest.raises(ValueError, match="asks for 8 GPUs, and there are 7"):
            build_app(config)


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL))
def test_an_example_in_the_docs_is_valid(block: str) -> None:
    example = yaml.safe_load(block)
    if isinstance(example, list):
        TypeAdapter(list[APIKey]).validate_python(example)
    elif example.keys() <= MODEL.keys():
        AppConfig.model_validate(OPEN | {"models": [MODEL | example]})
    else:
        AppConfig.model_validate(OPEN | {"models": [MODEL]} | example)


def test_the_docs_configure_both_helpers() -> None:
    assert DOCS.count("```yaml\nsafety_checker:\n") == 1
    assert DOCS.count("```yaml\nprompt_expander:\n") == 2
