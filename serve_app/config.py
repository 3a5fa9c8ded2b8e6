"""The configuration: what stands under `args` of the application in a Serve config file."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, HttpUrl, model_validator

from deployments.config import Config, ModelConfig


class Limits(Config):
    """What a request may ask for."""

    max_prompt_chars: int = Field(default=32_000, ge=1, description="Longest prompt, in characters.")
    max_images: int = Field(default=10, ge=1, description="Most images of one request (`n`).")
    max_steps: int = Field(default=100, ge=1, description="Most denoising steps.")
    max_guidance_scale: float = Field(
        default=20, ge=0, allow_inf_nan=False, description="Largest guidance scale."
    )
    max_pending: int = Field(
        default=64,
        ge=1,
        description="Most images that wait or are being made at a time, in one ingress replica; beyond it "
        "requests get a 429 with `Retry-After`.",
    )
    deadline_s: float = Field(
        default=580,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may take, loading included; then it gets a 504 and its work is "
        "stopped. OpenAI's clients give up after 600.",
    )
    max_body_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="Largest request body; more is refused while it comes in."
    )


class StorageConfig(Config):
    """Where results are kept."""

    url: str = Field(
        default_factory=lambda: str(Path.home() / ".local/share/glm-image-server/files"),
        description="A folder, or any other URL that fsspec writes to.",
    )


class ClusterConfig(Config):
    """The Ray cluster that it runs on."""

    autoscaling: bool = Field(
        default=False,
        description="Whether nodes with GPUs come on demand. If not, a configuration that asks for more "
        "GPUs than there are is refused at the start.",
    )


class AppConfig(Config):
    """The whole configuration of the application."""

    models: tuple[ModelConfig, ...] = Field(description="What is served; the first one is the default.")
    limits: Limits = Field(default_factory=Limits, description="What a request may ask for.")
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="The Ray cluster that it runs on."
    )
    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where results are kept.")
    public_url: HttpUrl | None = Field(
        default=None, description="Base of the URLs in answers; unset, what the client used."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"there must be a model, and model names must differ, not {names}")
        if self.limits.max_images > self.limits.max_pending:
            raise ValueError("limits.max_images is above limits.max_pending: such a request could never run")
        for model in self.models:
            if model.defaults.steps > self.limits.max_steps:
                raise ValueError(f"the default steps of {model.name} are above limits.max_steps")
            if model.defaults.guidance_scale > self.limits.max_guidance_scale:
                raise ValueError(f"the default guidance of {model.name} is above limits.max_guidance_scale")
        return self
