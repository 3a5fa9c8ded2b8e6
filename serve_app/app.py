"""The only wiring: from a configuration to a Ray Serve application."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config import ModelConfig, StageConfig
from deployments.decoder import DecoderStage
from deployments.errors import EngineFault
from deployments.prior import PriorStage
from deployments.scaling import RENEWAL_S, GateKeeper, ScalingPolicy
from serve_app.config import AppConfig
from serve_app.database import Database
from serve_app.errors import ReplicaDied, RequestError
from serve_app.generation import Generator, Model
from serve_app.ingress import create_app
from serve_app.lifecycle import Lifecycle
from serve_app.status import Deployment, StatusReader
from serve_app.storage import FileStore

GOING: dict[str, Any] = {"graceful_shutdown_timeout_s": 600, "graceful_shutdown_wait_loop_s": 0.2}
"""A replica that is to go may finish what it has, which takes up to minutes; an idle one goes at once."""


def build_app(args: AppConfig) -> Application:
    """Build the application of a configuration.

    Serve config files name it as `import_path: serve_app.app:build_app`. Serve reads the annotation of
    `args`, so this module has no postponed annotations.

    Raises:
        ValueError: the cluster, if there is one already, has fewer GPUs than the configuration asks for.
    """
    if ray.is_initialized() and (problem := lacking_gpus(args)):
        raise ValueError(problem)
    stages = {model.name: _bind_stages(model) for model in args.models}
    # Requests wait for images here, so their number is no measure of load; Ray's default of 5 would be one.
    # The ingress logs its requests itself, see `serve_app.telemetry`; Serve puts JSON into its files only.
    log = {"encoding": "JSON", "enable_access_log": False}
    options = GOING | {"max_ongoing_requests": 10_000, "logging_config": log}
    ingress = serve.deployment(**(options | args.ingress.deployment))(serve.ingress()(Ingress))
    return ingress.bind(args, stages)


def lacking_gpus(config: AppConfig) -> str | None:
    """What is wrong if the cluster has too few GPUs: Ray would wait for more to be added, for ever."""
    stages = [stage for model in config.models for stage in (model.prior, model.decoder)]
    wanted = sum(stage.max_replicas * stage.num_gpus for stage in stages)
    present = ray.cluster_resources().get("GPU", 0)
    if wanted <= present or config.cluster.autoscaling:
        return None
    return (
        f"The configuration asks for {wanted:g} GPUs, and Ray finds {present:g}. Choose another one, set "
        "fewer max_replicas or smaller num_gpus or, where nodes come on demand, cluster.autoscaling: true."
    )


def _bind_stages(model: ModelConfig) -> dict[str, Application]:
    stages: dict[str, Application] = {}
    for name, cls, stage, at_once in (
        ("prior", PriorStage, model.prior, model.prior.rows),
        ("decoder", DecoderStage, model.decoder, 1),
    ):
        options: dict[str, Any] = {
            "name": f"{model.name}-{name}",
            # One request more than run at once: it begins without a pause when another one ends.
            "max_ongoing_requests": at_once + 1,
            "autoscaling_config": _autoscaling(model.name, stage, at_once),
            "logging_config": {"encoding": "JSON"},
            "health_check_period_s": RENEWAL_S,  # a dead replica is noticed, and replaced, no later
        }
        stages[name] = serve.deployment(**(GOING | options | stage.deployment))(cls).bind(model)
    return stages


def _autoscaling(model: str, stage: StageConfig, at_once: int) -> AutoscalingConfig:
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={
            "model": model,
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
            target_ongoing_requests=stage.target_load or at_once,
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
        changed = asyncio.Event()
        models = {
            model.name: Model(
                config=model,
                prior=_caller(stages[model.name]["prior"].generate),
                decode=_caller(stages[model.name]["decoder"].decode),
            )
            for model in config.models
        }
        self._generator = Generator(models, config.limits, changed.set)
        app_name = serve.get_replica_context().app_name
        gate = GateKeeper(app_name)
        status = StatusReader(
            app_name,
            {
                model.name: {
                    stage: Deployment(name=handle.deployment_name, num_gpus=getattr(model, stage).num_gpus)
                    for stage, handle in stages[model.name].items()
                }
                for model in config.models
            },
            gate,
            autoscaling=config.cluster.autoscaling,
        )
        lifecycle = Lifecycle(self._generator, changed, gate, status)
        files, database = FileStore(config.storage), Database(config.database.url)
        self._app = create_app(config, self._generator, lifecycle, files, database)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        return self._app

    async def drain(self) -> None:
        """Take on nothing more; return when requests have ended and jobs are back in the queue."""
        await asyncio.gather(self._generator.drain(), self._app.state.runner.stop())


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
