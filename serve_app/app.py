"""The only wiring: from a configuration to a Ray Serve application."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config import ModelConfig
from deployments.decoder import DecoderStage
from deployments.errors import EngineFault
from deployments.prior import PriorStage
from serve_app.config import AppConfig
from serve_app.errors import ReplicaDied, RequestError
from serve_app.generation import Generator, Model
from serve_app.ingress import create_app
from serve_app.status import StatusReader
from serve_app.storage import FileStore

DRAIN_S = 600
"""How long a replica that is to go may finish what it has; an image takes up to minutes."""


def build_app(args: AppConfig) -> Application:
    """Build the application of a configuration.

    Serve config files name it as `import_path: serve_app.app:build_app`. Serve reads the annotation of
    `args`, so this module has no postponed annotations.
    """
    stages = {model.name: _bind_stages(model) for model in args.models}
    # Requests wait for images here, so their number is no measure of load; Ray's default of 5 would be one.
    options: dict[str, Any] = {"max_ongoing_requests": 10_000, "graceful_shutdown_timeout_s": DRAIN_S}
    return serve.deployment(**options)(serve.ingress()(Ingress)).bind(args, stages)


def _bind_stages(model: ModelConfig) -> dict[str, Application]:
    stages: dict[str, Application] = {}
    # One request more than run at once: it begins without a pause when another one ends.
    for name, cls, stage, at_once in (
        ("prior", PriorStage, model.prior, model.prior.rows),
        ("decoder", DecoderStage, model.decoder, 1),
    ):
        options: dict[str, Any] = {
            "name": f"{model.name}-{name}",
            "max_ongoing_requests": at_once + 1,
            "graceful_shutdown_timeout_s": DRAIN_S,
            "health_check_period_s": 2,  # a dead replica is noticed, and replaced, no later
        }
        stages[name] = serve.deployment(**(options | stage.deployment))(cls).bind(model)
    return stages


class Ingress:
    """The API plane, in one replica."""

    def __init__(self, config: AppConfig, stages: dict[str, dict[str, DeploymentHandle[Any]]]) -> None:
        self._config = config
        self._stages = stages

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        models = {
            model.name: Model(
                config=model,
                prior=_caller(self._stages[model.name]["prior"].generate),
                decode=_caller(self._stages[model.name]["decoder"].decode),
            )
            for model in self._config.models
        }
        status = StatusReader(
            serve.get_replica_context().app_name,
            {
                model: {stage: handle.deployment_name for stage, handle in handles.items()}
                for model, handles in self._stages.items()
            },
        )
        return create_app(
            self._config,
            Generator(models, self._config.limits),
            FileStore(self._config.storage.url),
            status.read,
        )


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
