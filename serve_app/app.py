"""The wiring: from a configuration to a Ray Serve application."""

import asyncio
import logging
import warnings
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
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
from deployments.observability import console, tracing
from deployments.scaling import NAMESPACE, RENEWAL_S, DemandRegistry, ScalingPolicy
from deployments.stages.models import DecoderStage, PriorStage, PromptExpander, SafetyChecker
from serve_app.cluster import fleet
from serve_app.cluster.actors import ActorClient
from serve_app.cluster.fleet import Fleet, FleetClient
from serve_app.cluster.lifecycle import Lifecycle
from serve_app.cluster.status import HELPER, Deployment, StatusReader
from serve_app.config import AppConfig, ClusterConfig
from serve_app.errors import Busy, ReplicaDied, Unavailable
from serve_app.files.store import FileStore
from serve_app.generation import prompt_expansion, safety
from serve_app.generation.generator import Generator
from serve_app.generation.prompt_expansion import PromptExpansion
from serve_app.generation.safety import SafetyCheck
from serve_app.generation.sources import SourceReader
from serve_app.generation.unit import Model, StageCall
from serve_app.home import at_home
from serve_app.http.application import create_app
from serve_app.http.services import Services
from serve_app.jobs.database import Database
from serve_app.outbound import Outbound

GRACEFUL_SHUTDOWN: dict[str, Any] = {
    "graceful_shutdown_timeout_s": 600,
    "graceful_shutdown_wait_loop_s": 0.2,
}
"""A replica that is to stop finishes its requests, which takes up to minutes. An idle one stops at once."""

LOG = {"encoding": "JSON", "enable_access_log": False}
"""JSON goes to Serve's log files only. Serve's access log is off: our telemetry logs requests in more
detail."""


def build_app(args: AppConfig) -> Application:
    """Builds the application of a configuration.

    Serve config files name it: `import_path: serve_app.app:build_app`. Serve reads the annotation of `args`,
    so this module has no postponed annotations.

    Raises:
        ValueError: a cluster runs already, and has fewer GPUs than the configuration asks for.
    """
    if ray.is_initialized() and (problem := args.lacks_gpus(ray.cluster_resources().get("GPU", 0))):
        raise ValueError(problem)
    awake = args.models[0].name if args.wake_on_open else None
    stages = {
        name: {key: _bind(part, args.cluster, starts=name == awake) for key, part in parts.items()}
        for name, parts in _parts(args).items()
    }
    # Requests wait here for images, so Ray's default of 5 at a time would be a limit.
    options = GRACEFUL_SHUTDOWN | {"max_ongoing_requests": 10_000, "logging_config": LOG}
    ingress = serve.deployment(**(options | args.ingress.deployment))(serve.ingress()(Ingress))
    return ingress.bind(args, stages)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A deployment beside the ingress.

    Attributes:
        name: name of the deployment.
        cls: class of its replicas.
        argument: argument of their constructor.
        config: where and how they run.
        max_concurrency: requests that one replica runs at the same time.
        demand_key: name by which the demand registry knows it: its model's, or its own as a helper.
    """

    name: str
    cls: type[Any]
    argument: Any
    config: StageConfig
    max_concurrency: int
    demand_key: str


def _parts(config: AppConfig) -> dict[str, dict[str, _Part]]:
    """Returns all deployments, in the form of `StatusReader`."""
    parts = {
        model.name: {
            "prior": _Part(
                name=f"{model.name}-prior",
                cls=PriorStage,
                argument=model,
                config=model.prior,
                max_concurrency=model.prior.max_batch_size,
                demand_key=model.name,
            ),
            "decoder": _Part(
                name=f"{model.name}-decoder",
                cls=DecoderStage,
                argument=model,
                config=model.decoder,
                max_concurrency=1,
                demand_key=model.name,
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
    part = _Part(name=deployment, cls=cls, argument=config, config=config, max_concurrency=1, demand_key=name)
    return {name: {HELPER: part}}


def _bind(part: _Part, cluster: ClusterConfig, *, starts: bool) -> Application:
    """Binds a deployment to its argument.

    Args:
        part: the deployment.
        cluster: the Ray cluster.
        starts: whether it starts with a replica, which stops after the idle time if nobody needs it.
    """
    options: dict[str, Any] = {
        "name": part.name,
        # One request more than a replica runs: it begins without a pause when another one ends.
        "max_ongoing_requests": part.max_concurrency + 1,
        "autoscaling_config": _autoscaling(part, initial_replicas=1 if starts else None),
        "logging_config": LOG,
        "health_check_period_s": RENEWAL_S,  # a dead replica is replaced no later
    }
    chosen = dict(part.config.deployment)
    # The stages share the CPUs, and Ray's default would reserve one for each. Nodes that come on demand come
    # for what is reserved.
    if part.config.device == "cpu" and not cluster.autoscaling:
        chosen["ray_actor_options"] = {"num_cpus": 0} | chosen.get("ray_actor_options", {})
    return serve.deployment(**(GRACEFUL_SHUTDOWN | options | chosen))(part.cls).bind(part.argument)


def _autoscaling(part: _Part, *, initial_replicas: int | None) -> AutoscalingConfig:
    stage = part.config
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={
            "model": part.demand_key,
            "min_replicas": stage.min_replicas,
            "idle_timeout_s": stage.idle_timeout_s,
        },
    )
    with warnings.catch_warnings():
        # Serve deprecates `metrics_interval_s` for an environment variable that nothing reads.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=0,
            initial_replicas=initial_replicas,
            max_replicas=stage.max_replicas,
            target_ongoing_requests=stage.target_load or part.max_concurrency,
            policy=policy,
            # The policy has its own delays. It needs current metrics: an outdated one that is too high would
            # load a stage again that was just unloaded.
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=0.2,
            look_back_period_s=0.5,
            aggregation_function="min",
        )


def is_news(record: logging.LogRecord) -> bool:
    """Returns whether a line of the log is news. Serve warns again and again of a call that waits."""
    return not record.getMessage().startswith("Failed to route request after ")


class Ingress:
    """The API plane."""

    def __init__(self, config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]]) -> None:
        context = serve.get_replica_context()
        config = at_home(config, context.app_name)
        tracing.start(context.replica_tag)
        console.attach(context.deployment)
        logging.getLogger("ray.serve").addFilter(is_news)
        changed = asyncio.Event()
        fleet = _fleet(config, context.app_name)
        outbound, files = Outbound(config.outbound), FileStore(config.storage)
        models = {
            model.name: Model(
                config=model,
                prior=_stage_caller(stages[model.name]["prior"].generate),
                decode=_stage_caller(stages[model.name]["decoder"].decode),
                fleet=fleet,
            )
            for model in config.models
        }
        self._generator = Generator(
            models,
            config.limits,
            SourceReader(outbound, files, config.limits),
            changed.set,
            share=ray.put,
            safety=_safety(config, stages),
            expansion=_expansion(config, stages, outbound),
            fleet=fleet,
        )
        registry = ActorClient(DemandRegistry, context.app_name, NAMESPACE)
        deployments = {
            name: {
                key: Deployment(name=part.name, num_gpus=part.config.num_gpus) for key, part in parts.items()
            }
            for name, parts in _parts(config).items()
        }
        status = StatusReader(context.app_name, deployments, registry, autoscaling=config.cluster.autoscaling)
        lifecycle = Lifecycle(self._generator, changed, registry, status, fleet)
        server = f"{context.app_name}, in the Ray cluster at {ray.get_runtime_context().gcs_address}"
        database = Database(config.database.url, server)
        self._services = Services.of(config, self._generator, lifecycle, files, database, outbound)
        self._app = create_app(self._services)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application. Serve calls it in the replica."""
        return self._app

    async def drain(self) -> None:
        """Rejects new requests; returns when running ones have ended and jobs are back in the queue."""
        await asyncio.gather(self._generator.drain(), self._services.runner.stop())


def _fleet(config: AppConfig, app_name: str) -> FleetClient | None:
    """Returns the client that knows the other ingress replicas; None without any."""
    if not config.ingress.has_several_replicas:
        return None
    return FleetClient(ActorClient(Fleet, app_name, fleet.NAMESPACE))


def _safety(config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]]) -> SafetyCheck | None:
    if config.safety_checker is None:
        return None
    return SafetyCheck(config.safety_checker, _caller(stages[safety.NAME][HELPER].check))


def _expansion(
    config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]], outbound: Outbound
) -> PromptExpansion | None:
    """Returns the prompt expansion; None without one.

    Raises:
        ValueError: the environment variable of its key is not set.
    """
    expander = config.prompt_expander
    if expander is None:
        return None
    if expander.endpoint:
        ask = prompt_expansion.by_endpoint(expander.endpoint, outbound)
    else:
        ask = prompt_expansion.by_deployment(_caller(stages[prompt_expansion.NAME][HELPER].expand))
    return PromptExpansion(expander, ask, config.limits.max_prompt_chars)


def _stage_caller(method: DeploymentHandle[Any]) -> StageCall:
    """Returns a method of a model's stage like `_caller`; its source images are in Ray's object store.

    Ray resolves a reference only if it is an argument of its own.
    """
    call = _caller(method)
    return lambda request: call(replace(request, sources=()), request.sources)


def _caller(method: DeploymentHandle[Any]) -> Callable[..., AsyncGenerator[Any, None]]:
    """Returns a stage's method as an asynchronous generator function that knows no Ray."""
    streaming = method.options(stream=True)

    async def call(*args: Any) -> AsyncGenerator[Any, None]:
        items: Any = streaming.remote(*args)
        try:
            async for item in items:
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            items.cancel()  # Serve does that itself only when the whole HTTP request is cancelled
            raise
        # Serve would answer these two in plain text, past the handlers of the application.
        except BackPressureError as error:
            raise Busy("The server is busy; try again later.") from error
        except DeploymentUnavailableError as error:
            raise Unavailable(
                "A stage of the model cannot be reached; try again later. `/health` has its state."
            ) from error
        except RayActorError as error:
            raise ReplicaDied from error

    return call
