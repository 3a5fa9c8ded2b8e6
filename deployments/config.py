"""Configuration of the models and their stages."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deployments.cpus import cpu_limit
from deployments.families import FAMILIES, Family
from deployments.identity import identity

MAX_WINDOW = 16
"""Largest number of tokens of one request that a pass of the prior stage draws."""
MAX_GPU_LINES = 64
"""Number of tokens of all requests that a pass on a GPU reads at most, unless the configuration says more.

On an H200, a pass of 64 requests with a token each took 1.1 to 1.2 times as long as one of 8
(`tests/gpu/figures/nvidia-h200.jsonl`).
"""

# YAML reads `off` as false.
Speculation = Annotated[
    Literal["auto", "off"] | Annotated[int, Field(ge=2, le=MAX_WINDOW)],
    BeforeValidator(lambda chosen: "off" if chosen is False else chosen),
]


def gpu_window(speculation: Speculation, requests: int) -> int:
    """Returns the number of tokens of each request that a pass on a GPU reads.

    Args:
        speculation: see `PriorConfig`.
        requests: number of requests in a pass.
    """
    if isinstance(speculation, int):
        return speculation
    return 1 if speculation == "off" else max(1, min(MAX_WINDOW, MAX_GPU_LINES // requests))


def _by_family(trait: str, *, unset: str = "") -> str:
    """Returns the values of a trait, each with its family in parentheses, for descriptions.

    Args:
        trait: name of the trait.
        unset: text for None.
    """
    values = {name: getattr(family, trait) for name, family in FAMILIES.items()}
    return " or ".join(f"{unset if value is None else value} (`{name}`)" for name, value in values.items())


DEVICE = "`cuda` or `cpu`. Ray chooses the GPU."
DTYPE = "Precision of the weights and of the arithmetic."


class Config(BaseModel):
    """Base of every part of the configuration. It is immutable and rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(Config):
    """Configuration of one stage: where and how it runs."""

    deployment: dict[str, Any] = Field(
        default_factory=dict,
        description="Options passed to the stage's Ray Serve deployment: `ray_actor_options` (`num_gpus`, "
        "`num_cpus`, …), `max_ongoing_requests`, …. With `device: cpu`, `num_cpus` defaults to 0, unless "
        "`cluster.autoscaling` is on: the stages share the machine's CPUs, and none waits until another one "
        "stops.",
    )
    min_replicas: int = Field(
        default=0,
        ge=0,
        description="Minimum number of replicas, except after an unload by hand. With 0, nothing is loaded "
        "before the first request.",
    )
    max_replicas: int = Field(default=1, ge=1, description="Maximum number of replicas.")
    target_load: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Requests per replica, running and waiting, above which another replica is started. "
        "Defaults to the number that one replica runs at the same time.",
    )
    idle_timeout_s: float = Field(
        default=300,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a replica that is not needed stops and releases its memory.",
    )
    device: Literal["cuda", "cpu"] = Field(default="cuda", description=DEVICE)
    dtype: Literal["bfloat16", "float16", "float32"] = Field(default="bfloat16", description=DTYPE)
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        validate_default=True,
        description="Threads for one replica's arithmetic on CPUs. With `device: cpu`, defaults to the "
        "replica's `num_cpus` or, without it, to all CPUs of the machine that reads the configuration. On a "
        "CPU, the same seed gives the same bytes only with the same number of threads. So set it where "
        "machines differ.",
    )

    @field_validator("cpu_threads")
    @classmethod
    def _default_threads(cls, chosen: int | None, info: ValidationInfo) -> int | None:
        if chosen is not None or info.data.get("device") != "cpu":
            return chosen
        options = info.data.get("deployment", {}).get("ray_actor_options") or {}
        return int(options.get("num_cpus") or 0) or cpu_limit()

    @property
    def num_gpus(self) -> float:
        """Number of GPUs of one replica, as Ray counts them."""
        bundles = self.deployment.get("placement_group_bundles") or [
            {"GPU": self.deployment.get("ray_actor_options", {}).get("num_gpus") or 0}
        ]
        return sum(float(bundle.get("GPU", 0)) for bundle in bundles)

    @model_validator(mode="after")
    def _scales_itself(self) -> Self:
        if ours := {"num_replicas", "autoscaling_config"} & self.deployment.keys():
            raise ValueError(
                f"deployment.{ours.pop()} cannot be set: the stage's min_replicas, max_replicas, target_load "
                "and idle_timeout_s control its scaling; use these instead"
            )
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is above max_replicas: {self.min_replicas} > {self.max_replicas}; lower the "
                "former or raise the latter"
            )
        return self

    @model_validator(mode="after")
    def _reserves_its_gpu(self) -> Self:
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError(
                "a stage with device: cuda needs deployment.ray_actor_options.num_gpus; set it, for example "
                "to 1, or all replicas would share the first GPU"
            )
        return self


class PriorConfig(StageConfig):
    """Configuration of the prior stage."""

    max_batch_size: int = Field(
        default=8, ge=1, description="Maximum number of requests that one replica runs at the same time."
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens of one request, read and generated. A family that generates "
        "tokens allocates its cache for all requests when it loads. Defaults to "
        f"{_by_family('max_sequence_length')}.",
    )
    speculation: Speculation = Field(
        default="auto",
        description="Number of tokens of a request that a pass may draw. `auto`: chosen from measured times "
        f"on a CPU; on a GPU {MAX_GPU_LINES} divided by `max_batch_size`, at most {MAX_WINDOW}. `off`: one. "
        f"A number: 2 to {MAX_WINDOW}. On a CPU the tokens are the same for every value, and only "
        "`dtype: float32` has several. On a GPU another value changes pixels by rounding, and so the model's "
        "identity.",
    )

    @property
    def may_speculate(self) -> bool:
        """Whether a token's arithmetic does not depend on the other tokens of its pass."""
        return self.device == "cuda" or self.dtype == "float32"

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        for old, new in {"rows": "max_batch_size", "row_tokens": "max_sequence_length"}.items():
            if isinstance(fields, dict) and old in fields:
                if new in fields:
                    raise ValueError(f"{old} is the old name of {new}; remove {old} and keep {new}")
                warnings.warn(f"prior.{old} is now prior.{new}; rename it", FutureWarning, stacklevel=2)
                fields = {new if name == old else name: value for name, value in fields.items()}
        return fields


class Acceleration(Config):
    """Options that make the decoder stage faster or smaller. Options that change pixels say so."""

    compile: bool | None = Field(
        default=None,
        description="Compile the DiT's blocks and the VAE. Steps are faster; the first start takes longer. "
        "Pixels change by rounding. Defaults to true on `cuda`, unless `step_cache`, `quantization` or "
        "`offload: group` is set.",
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
        description="Attention backend of diffusers. Some need their own package. Pixels change by rounding, "
        "and by more with `sage`.",
    )
    offload: Literal["auto", "none", "model", "group"] = Field(
        default="auto",
        description="Keep weights in the CPU's memory until they are needed. `model` moves one component at "
        "a time. `group` moves one layer at a time, which is slower and needs less GPU memory. `auto` "
        "chooses `none` if everything fits, else `model`, and logs the choice.",
    )
    quantization: Literal["none", "fp8"] = Field(
        default="none",
        description="`fp8` stores the DiT's weights in 8 bits, which halves their memory. Steps take longer. "
        "Pixels change.",
    )
    step_cache: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="Threshold of diffusers' first-block cache. A step skips the other blocks if its first "
        "block's output has changed by less than this since the last step. 0.1 is careful; 0 disables the "
        "cache. Pixels change.",
    )
    vae_tiling: bool = Field(
        default=False,
        description="Decode large images in tiles, with a fraction of the memory. Pixels change near seams.",
    )

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile and not self.allows_compile:
            raise ValueError(
                "acceleration.compile: true cannot be combined with step_cache, quantization or offload: "
                "group, which change the DiT's blocks from inside; remove compile or the other option"
            )
        return self

    @property
    def allows_compile(self) -> bool:
        """Whether the model can be compiled: no other option works inside the DiT's blocks."""
        return not self.step_cache and self.quantization == "none" and self.offload != "group"


class DecoderConfig(StageConfig):
    """Configuration of the decoder stage."""

    acceleration: Acceleration = Field(
        default_factory=Acceleration, description="Options that make the stage faster or smaller."
    )

    @property
    def compiles(self) -> bool:
        """Whether the stage compiles its model."""
        chosen = self.acceleration.compile
        return self.device == "cuda" and self.acceleration.allows_compile if chosen is None else chosen

    @property
    def options_that_change_pixels(self) -> dict[str, Any]:
        """The options in use that change pixels, with their values."""
        chosen = self.acceleration.model_dump(exclude_defaults=True, exclude={"offload", "compile"})
        return chosen | ({"compile": True} if self.compiles else {})

    @property
    def lossy(self) -> list[str]:
        """Names of the options in use that change pixels.

        `compile` is listed on a CPU only: there, unlike on a GPU, the uncompiled stage has upstream's pixels.
        """
        hidden = {"compile"} if self.device == "cuda" else set()
        return sorted(self.options_that_change_pixels.keys() - hidden)

    @model_validator(mode="after")
    def _offloads_from_a_gpu(self) -> Self:
        if self.device == "cpu" and self.acceleration.offload in ("model", "group"):
            raise ValueError(
                f"acceleration.offload: {self.acceleration.offload} needs device: cuda; on a CPU there is "
                "nothing to offload, so remove it"
            )
        return self


REVISION = "Hub commit to load, all 40 digits. It keeps the weights the same from start to start."
COMMIT = "^[0-9a-f]{40}$"
DEFAULT_CLASSIFIER = "Falconsai/nsfw_image_detection"
DEFAULT_CLASSIFIER_REVISION = "63e0a066bb08d2ae47324b540fba3adfd4536569"


class ClassifierConfig(StageConfig):
    """Configuration of the safety checker's classifier, small enough for a CPU."""

    device: Literal["cuda", "cpu"] = Field(default="cpu", description=DEVICE)
    dtype: Literal["bfloat16", "float16", "float32"] = Field(default="float32", description=DTYPE)
    checkpoint: str = Field(
        default=DEFAULT_CLASSIFIER,
        min_length=1,
        description="Image classifier, a ViT of transformers: a folder, a Hub id (which needs `revision`), "
        "or `tiny` for random weights.",
    )
    revision: str | None = Field(
        default=None,
        pattern=COMMIT,
        description=f"{REVISION} Defaults to `{DEFAULT_CLASSIFIER_REVISION}` for the default checkpoint.",
    )
    unsafe_labels: tuple[str, ...] = Field(
        default=("nsfw",),
        min_length=1,
        description="Labels of the classifier that count as unsafe. An image's score is the sum of their "
        "probabilities.",
    )

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("checkpoint", DEFAULT_CLASSIFIER) == DEFAULT_CLASSIFIER:
            return {"revision": DEFAULT_CLASSIFIER_REVISION} | fields
        return fields


class ChatModelConfig(StageConfig):
    """Configuration of the prompt expander's chat model."""

    checkpoint: str = Field(
        min_length=1,
        description="Chat model of transformers: a folder, a Hub id (which needs `revision`), or `tiny` for "
        "random weights, which write random letters.",
    )
    revision: str | None = Field(default=None, pattern=COMMIT, description=REVISION)


MIN_STRENGTH = 0.01
"""Smallest `strength`. With less, an edit might have no denoising step."""


class Defaults(Config):
    """Default values of a request's parameters."""

    steps: int = Field(default=50, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=f"Scale of classifier-free guidance. Defaults to {_by_family('guidance_scale')}.",
    )
    edit_guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Guidance scale for edits. Defaults to "
        f"{_by_family('edit_guidance_scale', unset='`guidance_scale`')}.",
    )
    strength: float = Field(
        default=0.6,
        ge=MIN_STRENGTH,
        le=1,
        description="Share of a source image that an edit paints over, for families that support `strength`.",
    )
    width: int = Field(
        default=1024, ge=1, description="Width in pixels. Edits use the first source image's instead."
    )
    height: int = Field(
        default=1024, ge=1, description="Height in pixels. Edits use the first source image's instead."
    )


class ModelConfig(Config):
    """Configuration of one model."""

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the model, for clients."
    )
    description: str | None = Field(
        default=None,
        min_length=1,
        description="Text about the model, shown in `/v1/models` and the playground.",
    )
    examples: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Prompts that show what the model can do; by default its family's. The playground offers "
        "the first three, and any of them as a surprise.",
    )
    vocabulary: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="For a model that knows few words: these, in lower case. The playground gives a hint on "
        "prompts with none of them.",
    )
    family: str = Field(description=f"Architecture: {' or '.join(f'`{name}`' for name in FAMILIES)}.")
    checkpoint: str = Field(
        min_length=1,
        description="Checkpoint in diffusers' layout: a folder, or a Hub id (which needs `revision`). `demo` "
        "is a small GLM-Image that makes simple scenes on a CPU. `tiny` has random weights, for tests.",
    )
    revision: str | None = Field(
        default=None,
        pattern=COMMIT,
        description=REVISION,
    )
    compile_cache: str = Field(
        default="~/.cache/glm-image-server/compiled",
        min_length=1,
        description="Folder on each machine that keeps compiled code between starts. Replicas with different "
        "versions or GPUs may share it.",
    )
    defaults: Defaults = Field(default_factory=Defaults, description="Default parameters of requests.")
    prior: PriorConfig = Field(
        description="Prior stage, which reads prompts: an autoregressive model or a text encoder."
    )
    decoder: DecoderConfig = Field(
        description="Decoder stage, a diffusion model. It has the keys `deployment` to `cpu_threads` of "
        "`prior`, and:"
    )

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}; choose one of these")
        return family

    @model_validator(mode="after")
    def _legal_default_size(self) -> Self:
        width, height = self.defaults.width, self.defaults.height
        if not self.traits.is_legal_size(width, height):
            raise ValueError(
                f"default size {width}x{height}: each side must be {self.traits.legal_sides}; change "
                "defaults.width or defaults.height"
            )
        return self

    @model_validator(mode="after")
    def _speculates_on_tokens(self) -> Self:
        if self.prior.speculation != "auto" and not self.traits.draws_tokens:
            raise ValueError(f"prior.speculation: the family {self.family} draws no tokens; remove it")
        if isinstance(self.prior.speculation, int) and not self.prior.may_speculate:
            raise ValueError(
                "prior.speculation: on a CPU, several tokens in a pass need dtype: float32; set that, or "
                "remove speculation"
            )
        return self

    @property
    def traits(self) -> Family:
        """Traits of the model's family."""
        return FAMILIES[self.family]

    @cached_property
    def identity(self) -> str:
        """Text that is equal for equal pixels; see `deployments.identity`."""
        return identity(self)

    @property
    def gpu_pass(self) -> tuple[int, int] | None:
        """Shape of a drawing pass on a GPU: requests, and tokens of each. None where no such pass is made."""
        if self.prior.device == "cpu" or not self.traits.draws_tokens:
            return None
        requests = self.prior.max_batch_size
        return requests, gpu_window(self.prior.speculation, requests)

    @property
    def weights(self) -> str:
        """Name of the weights. Both stages must have the same: a decoder cannot use another model's prior."""
        return f"{self.family} {self.checkpoint} {self.revision}"

    @property
    def max_sequence_length(self) -> int:
        """Maximum number of tokens of a request in the prior stage."""
        return self.prior.max_sequence_length or self.traits.max_sequence_length

    def guidance_scale(self, *, editing: bool) -> float:
        """Returns the default guidance scale.

        Args:
            editing: whether the request has source images.
        """
        if editing:
            for scale in (self.defaults.edit_guidance_scale, self.traits.edit_guidance_scale):
                if scale is not None:
                    return scale
        scale = self.defaults.guidance_scale
        return self.traits.guidance_scale if scale is None else scale
