"""The only wiring: from a configuration to a Ray Serve application."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.config import ModelConfig
from deployments.decoder import DecoderStage
from deployments.prior import PriorStage
from serve_app.config import AppConfig
from serve_app.generation import Generator, Model
from serve_app.ingress import create_app
from serve_app.status import StatusReader
from serve_app.storage import FileStore


def build_app(args: AppConfig) -> Application:
    """Build the application of a configuration.

    Serve config files name it as `import_path: serve_app.app:build_app`. Serve reads the annotation of
    `args`, so this module has no postponed annotations.
    """
    stages = {model.name: _bind_stages(model) for model in args.models}
    # Requests wait for images here, so their number is no measure of load; Ray's default of 5 would be one.
    ingress = serve.deployment(max_ongoing_requests=10_000)(serve.ingress()(Ingress))
    return ingress.bind(args, stages)


def _bind_stages(model: ModelConfig) -> dict[str, Application]:
    stages: dict[str, Application] = {}
    # One request more than run at once: it begins without a pause when another one ends.
    for name, cls, stage, at_once in (
        ("prior", PriorStage, model.prior, model.prior.rows),
        ("decoder", DecoderStage, model.decoder, 1),
    ):
        options: dict[str, Any] = {"name": f"{model.name}-{name}", "max_ongoing_requests": at_once + 1}
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
                prior=self._stages[model.name]["prior"].generate.remote,
                decode=self._stages[model.name]["decoder"].decode.remote,
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
