"""The only wiring: from a configuration to a Ray Serve application."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config import StageConfig
from deployments.errors import EngineFault
from deployments.observability import tracing
from deployments.scaling import RENEWAL_S, GateKeeper, ScalingPolicy
from deployments.stages.decoder import DecoderStage
from deployments.stages.prior import PriorStage
from deployments.stages.prompt_expansion import PromptExpander
from deployments.stages.safety import SafetyChecker
from serve_app.cluster.lifecycle import Lifecycle
from serve_app.cluster.status import HELPER, Deployment, StatusReader
from serve_app.config import AppConfig
from serve_app.errors import ReplicaDied, RequestError
from serve_app.files.store import FileStore
from serve_app.generation import prompt_expansion, safety
from serve_app.generation.generator import Generator
from serve_app.generation.image import Model
from serve_app.generation.prompt_expansion import PromptExpansion
from serve_app.generation.safety import SafetyCheck
from serve_app.http.application import create_app
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound

GOING: dict[str, Any] = {"graceful_shutdown_timeout_s": 600, "graceful_shutdown_wait_loop_s": 0.2}
"""A replica that is to go may finish what it has, which takes up to minutes; an idle one goes at once."""

LOG = {"encoding": "JSON", "enable_access_log": False}
"""JSON, which Serve puts into its files only; of requests we write lines of our own, which say more."""


def build_app(args: AppConfig) -> Application:
    """Build the application of a configuration.

    Serve config files name it as `import_path: serve_app.app:build_app`. Serve reads the annotation of
    `args`, so this module has no postponed annotations.

    Raises:
        ValueError: the cluster, if there is one already, has fewer GPUs than the configuration asks for.
    """
    if ray.is_initialized() and (problem := lacking_gpus(args)):
        raise ValueError(problem)
    stages = {name: {key: _bind(part) for key, part in parts.items()} for name, parts in _parts(args).items()}
    # Requests wait for images here, so their number is no measure of load; Ray's default of 5 would be one.
    options = GOING | {"max_ongoing_requests": 10_000, "logging_config": LOG}
    ingress = serve.deployment(**(options | args.ingress.deployment))(serve.ingress()(Ingress))
    return ingress.bind(args, stages)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A deployment beside the ingress.

    Attributes:
        name: its own.
        cls: what its replicas run.
        argument: what they are made with.
        config: where and how they run.
        at_once: requests that one runs side by side.
        needed_as: by which name it is known that there is work for it.
    """

    name: str
    cls: type[Any]
    argument: Any
    config: StageConfig
    at_once: int
    needed_as: str


def _parts(config: AppConfig) -> dict[str, dict[str, _Part]]:
    """All of them, as `StatusReader` has them."""
    parts = {
        model.name: {
            "prior": _Part(
                name=f"{model.name}-prior",
                cls=PriorStage,
                argument=model,
                config=model.prior,
                at_once=model.prior.max_batch_size,
                needed_as=model.name,
            ),
            "decoder": _Part(
                name=f"{model.name}-decoder",
                cls=DecoderStage,
                argument=model,
                config=model.decoder,
                at_once=1,
                needed_as=model.name,
            ),
        }
        for model in config.models
    }
    if config.safety_checker:
        parts |= _helper(safety.NAME, SafetyChecker, config.safety_checker.classifier)
    if config.prompt_expander and config.prompt_expander.chat_model:
        parts |= _helper(prompt_expansion.NAME, PromptExpander, config.prompt_expander.chat_model)
    return parts


def _helper(name: str, cls: type[Any], config: StageConfig) -> dict[str, dict[str, _Part]]:
    deployment = name.replace(" ", "-")
    part = _Part(name=deployment, cls=cls, argument=config, config=config, at_once=1, needed_as=name)
    return {name: {HELPER: part}}


def lacking_gpus(config: AppConfig) -> str | None:
    """What is wrong if the cluster has too few GPUs: Ray would wait for more to be added, for ever."""
    stages = [part.config for parts in _parts(config).values() for part in parts.values()]
    wanted = sum(stage.max_replicas * stage.num_gpus for stage in stages)
    present = ray.cluster_resources().get("GPU", 0)
    if wanted <= present or config.cluster.autoscaling:
        return None
    return (
        f"The configuration asks for {wanted:g} GPUs, and Ray finds {present:g}. Choose another one, set "
        "fewer max_replicas or smaller num_gpus or, where nodes come on demand, cluster.autoscaling: true."
    )


def _bind(part: _Part) -> Application:
    options: dict[str, Any] = {
        "name": part.name,
        # One request more than run at once: it begins without a pause when another one ends.
        "max_ongoing_requests": part.at_once + 1,
        "autoscaling_config": _autoscaling(part),
        "logging_config": LOG,
        "health_check_period_s": RENEWAL_S,  # a dead replica is noticed, and replaced, no later
    }
    return serve.deployment(**(GOING | options | part.config.deployment))(part.cls).bind(part.argument)


def _autoscaling(part: _Part) -> AutoscalingConfig:
    stage = part.config
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={
            "model": part.needed_as,
            "min_replicas": stage.min_replicas,
            "idle_timeout_s": stage.idle_timeout_s,
        },
    )
    with warnings.catch_warnings():
        # Serve means to replace `metrics_interval_s` by a variable of the environment, which nothing reads.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=0,
            max_replicas=stage.max_replicas,
            target_ongoing_requests=stage.target_load or part.at_once,
            policy=policy,
            # The policy keeps all delays itself. What it is told must be fresh and never more than there is:
            # a stage that has none is woken by a queue, and an old queue would wake what was just unloaded.
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=0.2,
            look_back_period_s=0.5,
            aggregation_function="min",
        )


class Ingress:
    """The API plane."""

    def __init__(self, config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]]) -> None:
        tracing.start(serve.get_replica_context().replica_tag)
        changed = asyncio.Event()
        outbound = Outbound(config.outbound)
        models = {
            model.name: Model(
                config=model,
                prior=_caller(stages[model.name]["prior"].generate),
                decode=_caller(stages[model.name]["decoder"].decode),
            )
            for model in config.models
        }
        self._generator = Generator(
            models,
            config.limits,
            changed.set,
            safety=_safety(config, stages),
            expansion=_expansion(config, stages, outbound),
        )
        app_name = serve.get_replica_context().app_name
        gate = GateKeeper(app_name)
        status = StatusReader(
            app_name,
            {
                name: {
                    key: Deployment(name=part.name, num_gpus=part.config.num_gpus)
                    for key, part in parts.items()
                }
                for name, parts in _parts(config).items()
            },
            gate,
            autoscaling=config.cluster.autoscaling,
        )
        lifecycle = Lifecycle(self._generator, changed, gate, status)
        files, database = FileStore(config.storage), Database(config.database.url)
        self._app = create_app(config, self._generator, lifecycle, files, database, outbound)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        return self._app

    async def drain(self) -> None:
        """Take on nothing more; return when requests have ended and jobs are back in the queue."""
        await asyncio.gather(self._generator.drain(), self._app.state.runner.stop())


def _safety(config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]]) -> SafetyCheck | None:
    if config.safety_checker is None:
        return None
    return SafetyCheck(config.safety_checker, _caller(stages[safety.NAME][HELPER].check))


def _expansion(
    config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]], outbound: Outbound
) -> PromptExpansion | None:
    """The way to the prompt expander.

    Raises:
        ValueError: the variable of the environment that is to hold its key is not set.
    """
    expander = config.prompt_expander
    if expander is None:
        return None
    if expander.endpoint:
        ask = prompt_expansion.by_endpoint(expander.endpoint, outbound)
    else:
        ask = prompt_expansion.by_deployment(_caller(stages[prompt_expansion.NAME][HELPER].expand))
    return PromptExpansion(expander, ask, config.limits.max_prompt_chars)


def _caller(method: DeploymentHandle[Any]) -> Callable[[Any], AsyncGenerator[Any, None]]:
    """A stage's method as an asynchronous generator function that knows no Ray."""
    streaming = method.options(stream=True)

    async def call(request: Any) -> AsyncGenerator[Any, None]:
        items: Any = streaming.remote(request)
        try:
            async for item in items:
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            items.cancel()  # Serve does so by itself only when the whole HTTP request is cancelled
            raise
        # Serve would answer these two in plain text, whatever handlers the application has.
        except BackPressureError as error:
            raise RequestError("The server is busy; try again later.", code="busy", status=429) from error
        except DeploymentUnavailableError as error:
            raise RequestError("The model is not available.", code="unavailable", status=503) from error
        except (RayActorError, EngineFault) as error:
            raise ReplicaDied from error

    return call
