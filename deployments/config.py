"""The part of the configuration that describes models and their stages."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.families import FAMILIES, Family


def _of_families(trait: str) -> str:
    """In words, for descriptions."""
    values = {name: getattr(family, trait) for name, family in FAMILIES.items()}
    return ", ".join(
        f"{'as without' if value is None else str(value)} for `{name}`" for name, value in values.items()
    )


class Config(BaseModel):
    """Base of every part: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(Config):
    """One stage of a model: where it runs and how."""

    deployment: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the stage's Ray Serve deployment, passed through: `ray_actor_options` "
        "(`num_gpus`, `num_cpus`, …), `max_ongoing_requests`, …",
    )
    min_replicas: int = Field(
        default=0,
        ge=0,
        description="Replicas that are always kept, but after an unload by hand; with 0 nothing is loaded "
        "before the first request.",
    )
    max_replicas: int = Field(default=1, ge=1, description="Most replicas under load.")
    target_load: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Requests, running and waiting, that one replica is to have: with more there is another "
        "one. Unset, as many as it runs side by side.",
    )
    idle_timeout_s: float = Field(
        default=300,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a replica that is not needed goes and its memory is free again.",
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="`cuda` or `cpu`; Ray picks which GPU."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Precision of the weights and of the arithmetic."
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of one replica's CPU arithmetic; unset, Ray's choice (its `num_cpus`). "
        "On a CPU the same seed gives the same bytes only with the same number.",
    )

    @property
    def num_gpus(self) -> float:
        """GPUs of one replica, as Ray counts them."""
        bundles = self.deployment.get("placement_group_bundles") or [
            {"GPU": self.deployment.get("ray_actor_options", {}).get("num_gpus") or 0}
        ]
        return sum(float(bundle.get("GPU", 0)) for bundle in bundles)

    @model_validator(mode="after")
    def _scales_itself(self) -> Self:
        if ours := {"num_replicas", "autoscaling_config"} & self.deployment.keys():
            raise ValueError(
                f"deployment.{ours.pop()} cannot be set: the stage's min_replicas, max_replicas, target_load "
                "and idle_timeout_s say how it scales"
            )
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self

    @model_validator(mode="after")
    def _reserves_its_gpu(self) -> Self:
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError(
                "a stage on cuda needs deployment.ray_actor_options.num_gpus, 1 say; without, every replica "
                "would share the first GPU"
            )
        return self


class PriorConfig(StageConfig):
    """The prior stage."""

    max_batch_size: int = Field(
        default=8, ge=1, description="Most requests that one replica runs at the same time."
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of one request, read and generated. A family that generates tokens allocates "
        "its cache for all requests when it loads. Defaults to the family's: "
        f"{_of_families('max_sequence_length')}.",
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        for old, new in {"rows": "max_batch_size", "row_tokens": "max_sequence_length"}.items():
            if isinstance(fields, dict) and old in fields:
                if new in fields:
                    raise ValueError(f"{old} is the old name of {new}; give {new} alone")
                warnings.warn(f"prior.{old} is now prior.{new}; rename it", FutureWarning, stacklevel=2)
                fields = {new if name == old else name: value for name, value in fields.items()}
        return fields


class Acceleration(Config):
    """What makes the decoder stage faster or smaller. Options that change pixels say so."""

    compile: bool | None = Field(
        default=None,
        description="Compile the DiT's blocks and the VAE: faster steps, a longer first start. Pixels change "
        "by rounding. Defaults to true on `cuda`, unless `step_cache`, `quantization` or `offload: group` is "
        "set.",
    )
    attention: Literal[
        "native",
        "_native_cudnn",
        "_native_efficient",
        "_native_flash",
        "flash",
        "_flash_3",
        "sage",
        "xformers",
    ] = Field(
        default="native",
        description="diffusers' attention backend; some need a package of their own. Pixels change by "
        "rounding, with `sage` by more.",
    )
    offload: Literal["auto", "none", "model", "group"] = Field(
        default="auto",
        description="Weights wait in the CPU's memory: `model` moves a component at a time, `group` a layer "
        "at a time, slower and smaller. `auto`: `none` if it fits, else `model`; the log says which.",
    )
    quantization: Literal["none", "fp8"] = Field(
        default="none",
        description="`fp8` keeps the DiT's weights in 8 bits, half the memory; steps take longer. Pixels "
        "change.",
    )
    step_cache: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="diffusers' first-block cache: a step whose first block changes less than this from the "
        "last one's leaves the others out. 0.1 is careful, 0 is off. Pixels change.",
    )
    vae_tiling: bool = Field(
        default=False,
        description="Decode large images in tiles: a fraction of the VAE's memory. Pixels change near seams.",
    )

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile and not self.allows_compile:
            raise ValueError(
                "acceleration.compile cannot be combined with step_cache, quantization or offload: group, "
                "which change the DiT's blocks from inside; remove one of them"
            )
        return self

    @property
    def allows_compile(self) -> bool:
        """Whether no other option works inside the DiT's blocks."""
        return not self.step_cache and self.quantization == "none" and self.offload != "group"


class DecoderConfig(StageConfig):
    """The decoder stage."""

    acceleration: Acceleration = Field(
        default_factory=Acceleration, description="What makes the stage faster or smaller."
    )

    @property
    def compiles(self) -> bool:
        """Whether the stage compiles its model."""
        chosen = self.acceleration.compile
        return self.device == "cuda" and self.acceleration.allows_compile if chosen is None else chosen

    @property
    def lossy(self) -> list[str]:
        """The options in use that change pixels.

        Compiling counts on a CPU only. There the pixels are upstream's without it; on a GPU they are not.
        """
        chosen = self.acceleration.model_dump(exclude_defaults=True, exclude={"offload", "compile"})
        return sorted([*chosen, *["compile"] * (self.compiles and self.device == "cpu")])

    @model_validator(mode="after")
    def _offloads_from_a_gpu(self) -> Self:
        if self.device == "cpu" and self.acceleration.offload in ("model", "group"):
            raise ValueError(
                f"acceleration.offload: {self.acceleration.offload} needs device: cuda; on a CPU there is "
                "nothing to offload"
            )
        return self


REVISION = "The Hub commit to load, all 40 digits of it: what runs today runs tomorrow."
COMMIT = "^[0-9a-f]{40}$"
DEFAULT_CLASSIFIER = "Falconsai/nsfw_image_detection"
DEFAULT_CLASSIFIER_REVISION = "63e0a066bb08d2ae47324b540fba3adfd4536569"


class ClassifierConfig(StageConfig):
    """The classifier of the safety checker, small enough for a CPU: where it runs and how."""

    device: Literal["cuda", "cpu"] = Field(default="cpu", description="As of a stage, but for the default.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="float32", description="As of a stage, but for the default."
    )
    checkpoint: str = Field(
        default=DEFAULT_CLASSIFIER,
        min_length=1,
        description="A ViT for image classification of transformers: a folder, a Hub id (then `revision` "
        "too), or `tiny`: random weights.",
    )
    revision: str | None = Field(
        default=None,
        pattern=COMMIT,
        description=f"{REVISION} Unset, that of the default checkpoint is `{DEFAULT_CLASSIFIER_REVISION}`.",
    )
    unsafe_labels: tuple[str, ...] = Field(
        default=("nsfw",),
        min_length=1,
        description="Of the classifier's labels those whose probabilities, added up, are an image's score.",
    )

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("checkpoint", DEFAULT_CLASSIFIER) == DEFAULT_CLASSIFIER:
            return {"revision": DEFAULT_CLASSIFIER_REVISION} | fields
        return fields


class ChatModelConfig(StageConfig):
    """The chat model of the prompt expander: where it runs and how."""

    checkpoint: str = Field(
        min_length=1,
        description="A chat model of transformers: a folder, a Hub id (then `revision` too), or `tiny`: "
        "random weights, which write random letters.",
    )
    revision: str | None = Field(default=None, pattern=COMMIT, description=REVISION)


MIN_STRENGTH = 0.01
"""With less there might be no step to make."""


class Defaults(Config):
    """What a request that leaves a parameter out gets."""

    steps: int = Field(default=50, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=f"Classifier-free guidance. Unset, the family's: {_of_families('guidance_scale')}.",
    )
    edit_guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=f"Likewise for edits. Unset, the family's: {_of_families('edit_guidance_scale')}.",
    )
    strength: float = Field(
        default=0.6,
        ge=MIN_STRENGTH,
        le=1,
        description="How much of a source image an edit paints over, in families that take `strength`.",
    )
    width: int = Field(default=1024, ge=1, description="In pixels; edits take the first source's instead.")
    height: int = Field(default=1024, ge=1, description="In pixels; likewise.")


class ModelConfig(Config):
    """One model that the server offers."""

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="What clients call it."
    )
    description: str | None = Field(
        default=None,
        min_length=1,
        description="What people should know of it, told in `/v1/models` and the playground.",
    )
    family: str = Field(description=f"The architecture: {' or '.join(f'`{name}`' for name in FAMILIES)}.")
    checkpoint: str = Field(
        min_length=1,
        description="A folder in diffusers' layout, a Hub id (then `revision` too), `demo`: a small "
        "GLM-Image that paints simple scenes on a CPU, or `tiny`: random weights, for tests.",
    )
    revision: str | None = Field(
        default=None,
        pattern=COMMIT,
        description=REVISION,
    )
    compile_cache: str = Field(
        default="~/.cache/glm-image-server/compiled",
        min_length=1,
        description="Folder that keeps compiled code between starts, on each machine. Replicas with other "
        "versions or other GPUs may share it.",
    )
    defaults: Defaults = Field(default_factory=Defaults, description="For parameters a request leaves out.")
    prior: PriorConfig = Field(description="What reads prompts: an autoregressive model, or a text encoder.")
    decoder: DecoderConfig = Field(
        description="The diffusion stage; `deployment` to `cpu_threads` as above, and:"
    )

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        return family

    @model_validator(mode="after")
    def _legal_default_size(self) -> Self:
        width, height = self.defaults.width, self.defaults.height
        if not self.traits.is_legal_size(width, height):
            raise ValueError(f"default size {width}x{height}: each side must be {self.traits.legal_sides}")
        return self

    @property
    def traits(self) -> Family:
        """What is known of the model's family."""
        return FAMILIES[self.family]

    @property
    def weights(self) -> str:
        """Which they are. The stages' must be the same: a decoder can make nothing of another prior."""
        return f"{self.family} {self.checkpoint} {self.revision}"

    @property
    def max_sequence_length(self) -> int:
        """Tokens that a request may have in the prior stage."""
        return self.prior.max_sequence_length or self.traits.max_sequence_length

    def guidance_scale(self, *, editing: bool) -> float:
        """What a request gets that leaves it out."""
        if editing:
            for scale in (self.defaults.edit_guidance_scale, self.traits.edit_guidance_scale):
                if scale is not None:
                    return scale
        scale = self.defaults.guidance_scale
        return self.traits.guidance_scale if scale is None else scale
