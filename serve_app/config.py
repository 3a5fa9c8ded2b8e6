"""The configuration: what stands under `args` of the application in a Serve config file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, HttpUrl, model_validator

from deployments.config import ChatModelConfig, ClassifierConfig, Config, ModelConfig


class Limits(Config):
    """What a request may ask for."""

    max_prompt_chars: int = Field(default=32_000, ge=1, description="Longest prompt, in characters.")
    max_images: int = Field(default=10, ge=1, description="Most images of one request (`n`).")
    max_steps: int = Field(default=100, ge=1, description="Most denoising steps.")
    max_guidance_scale: float = Field(
        default=20, ge=0, allow_inf_nan=False, description="Largest guidance scale."
    )
    max_pixels: int = Field(default=2048 * 2048, ge=1, description="Most pixels of one image.")
    max_megapixel_steps: int = Field(
        default=2100,
        ge=1,
        description="Most work of one request: megapixels of an image × denoising steps × images. The "
        "default lets ten images of 2048×2048 have 50 steps.",
    )
    max_pending: int = Field(
        default=64,
        ge=1,
        description="Most images that wait or are being made at a time, in one ingress replica; beyond it "
        "requests get a 429 with `Retry-After`.",
    )
    max_pending_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Likewise for the requests with one API key, or with none. Unset, no bound.",
    )
    megapixel_steps_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Most work that may be asked for with one API key, in one ingress replica, within a "
        "minute that begins with a request; beyond it there are 429s with `Retry-After`. Unset, no bound.",
    )
    deadline_s: float = Field(
        default=580,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may take, loading included; then it gets a 504 and its work is "
        "stopped. OpenAI's clients give up after 600.",
    )
    max_jobs: int = Field(
        default=1000,
        ge=1,
        description="Most jobs that have not ended, in the whole database; beyond it there are 429s.",
    )
    job_deadline_s: float = Field(
        default=3600,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a job may take from its beginning, loading included; then it fails.",
    )
    max_body_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="Largest request body; more is refused while it comes in."
    )
    max_json_bytes: int = Field(
        default=2**20,
        ge=1024,
        description="Likewise for a generation's body: several times what the longest prompt takes, escaped. "
        "An edit's holds images.",
    )
    max_bodies_bytes: int = Field(
        default=2**30,
        ge=1024,
        description="Most bytes of all bodies together, while their requests last; beyond it they get a 429.",
    )
    body_timeout_s: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for a body to come in; then it gets a 408.",
    )
    max_image_bytes: int = Field(default=50 * 2**20, ge=1024, description="Largest source image, as a file.")
    max_source_pixels: int = Field(
        default=2**25,
        ge=256,
        description="Most pixels of a source image, looked at before decoding, which takes up to 17 bytes a "
        "pixel, for one image at a time.",
    )


class APIKey(Config):
    """A key, by what it is known without being known: its SHA-256, or a variable that holds it."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Its name in the log.")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="The key's SHA-256; `python -m serve_app keys new NAME` prints both.",
    )
    secret_env: str | None = Field(
        default=None, min_length=1, description="Instead: the variable of the environment that holds the key."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.sha256 is None) == (self.secret_env is None):
            raise ValueError("give either sha256 or secret_env")
        return self


class AuthConfig(Config):
    """Who may use the server."""

    open: bool = Field(
        default=False,
        description="Whether whoever reaches the port may. `make serve` takes it as false where that is not "
        "this machine alone.",
    )
    api_keys: tuple[APIKey, ...] = Field(default=(), description="The keys that are let in.")

    @model_validator(mode="after")
    def _closed_or_meant(self) -> Self:
        ids = [key.id for key in self.api_keys]
        if len(set(ids)) < len(ids):
            raise ValueError(f"the ids of api_keys must differ, not {ids}")
        if not ids and not self.open:
            raise ValueError(
                "there are no api_keys: make one with `python -m serve_app keys new NAME`, or set open: true "
                "if whoever reaches the port may use the server"
            )
        return self


MAX_SIGNED_S = 604_800
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html"""


class StorageConfig(Config):
    """Where results are kept."""

    url: str = Field(
        default_factory=lambda: str(Path.home() / ".local/share/glm-image-server/files"),
        description="A folder, or any other URL that fsspec writes to, `s3://bucket/prefix` say.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="For fsspec's file system: `endpoint_url` of another S3 than Amazon's, …. Credentials "
        "come from where Amazon's tools look: the environment, `~/.aws`, the machine's role.",
    )
    presigned: bool = Field(
        default=False,
        description="Whether URLs in answers lead to the object store itself, signed for `ttl_s`; else to "
        "`/files/` here.",
    )
    ttl_s: int = Field(default=7 * 86_400, ge=1, description="Seconds after which a file is deleted.")
    max_bytes: int = Field(
        default=20 * 2**30, ge=0, description="Most bytes of all files; beyond it the oldest are deleted."
    )
    min_free_bytes: int = Field(
        default=2**30,
        ge=0,
        description="What is to be left of a folder's disk; below it nothing more is written, and requests "
        "for a `url` get a 507.",
    )

    @model_validator(mode="after")
    def _signs(self) -> Self:
        if self.presigned and not self.url.startswith("s3://"):
            raise ValueError("presigned needs an s3:// URL: nothing else signs")
        if self.presigned and self.ttl_s > MAX_SIGNED_S:
            raise ValueError(f"ttl_s is above {MAX_SIGNED_S}, for which S3 signs at most")
        return self


class DatabaseConfig(Config):
    """Where jobs are kept."""

    url: str = Field(
        default_factory=lambda: f"sqlite:///{Path.home()}/.local/share/glm-image-server/jobs.db",
        pattern=r"^(sqlite:///.|postgresql://)",
        description="SQLAlchemy's URL of an SQLite file, `sqlite:///PATH`, or of a PostgreSQL database, "
        "`postgresql://USER@HOST/NAME`, which several ingress replicas may share. What it leaves out comes "
        "from the environment: `PGPASSWORD`, `PGPASSFILE`, ….",
    )


class IngressConfig(Config):
    """The API plane."""

    deployment: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of its Ray Serve deployment, passed through: `num_replicas`, "
        "`ray_actor_options`, …. More than one replica takes PostgreSQL and storage that all of them reach.",
    )


HostPort = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[1-9][0-9]{0,4}$")]


class OutboundConfig(Config):
    """Connections that users ask for: for the images that they name by URL, and for webhooks."""

    allow: tuple[HostPort, ...] = Field(
        default=(),
        description="`host:port` entries, with the host as users write it, that may be reached although "
        "they are not public.",
    )
    timeout_s: float = Field(
        default=30,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one may take, redirects included.",
    )


class SafetyCheckerConfig(Config):
    """Whether images are fit to be shown: those that are made, their previews, and source images."""

    classifier: ClassifierConfig = Field(
        default_factory=ClassifierConfig,
        description="What looks at images, in a deployment of its own; `deployment` to `cpu_threads` as of "
        "`models[].prior`, and:",
    )
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="The score, 0 to 1, from which on an image is flagged."
    )
    low_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Likewise for requests that ask for less: by `moderation: low` in OpenAI's API, by "
        "`enable_safety_checker: false` in fal's and Pixazo's. Unset, their images are not checked.",
    )
    on_failure: Literal["closed", "open"] = Field(
        default="closed",
        description="What becomes of images that cannot be checked: `closed`, their requests fail; `open`, "
        "they are handed out.",
    )
    timeout_s: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for one image, loading included, which begins with the request; then it cannot "
        "be checked.",
    )


class EndpointConfig(Config):
    """A language model behind OpenAI's API for chat completions."""

    base_url: HttpUrl = Field(
        description="What `/chat/completions` is put after. One that is not public stands in "
        "`outbound.allow`, too."
    )
    model: str = Field(min_length=1, description="What it is called there.")
    key_env: str | None = Field(
        default=None, min_length=1, description="The variable of the environment that holds the key."
    )


class PromptExpanderConfig(Config):
    """Who rewrites prompts, for requests that ask for that: one of the two."""

    chat_model: ChatModelConfig | None = Field(
        default=None, description="A chat model in a deployment of its own; likewise."
    )
    endpoint: EndpointConfig | None = Field(default=None, description="Somebody else's.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of a new prompt.")
    timeout_s: float = Field(
        default=30,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for one prompt, loading included; then it stays as it is.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.chat_model is None) == (self.endpoint is None):
            raise ValueError("give either chat_model or endpoint")
        return self


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
    auth: AuthConfig = Field(description="Who may use the server.")
    limits: Limits = Field(default_factory=Limits, description="What a request may ask for.")
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="The Ray cluster that it runs on."
    )
    storage: StorageConfig = Field(default_factory=StorageConfig, description="Where results are kept.")
    database: DatabaseConfig = Field(default_factory=DatabaseConfig, description="Where jobs are kept.")
    ingress: IngressConfig = Field(default_factory=IngressConfig, description="The API plane.")
    outbound: OutboundConfig = Field(
        default_factory=OutboundConfig, description="Connections that users ask for."
    )
    safety_checker: SafetyCheckerConfig | None = Field(
        default=None, description="Looks at images; unset, nobody does. `{}` has the defaults."
    )
    prompt_expander: PromptExpanderConfig | None = Field(
        default=None, description="Rewrites prompts; unset, nobody does."
    )
    public_url: HttpUrl | None = Field(
        default=None, description="Base of the URLs in answers; unset, what the client used."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"there must be a model, and model names must differ, not {names}")
        replicas = self.ingress.deployment
        several = replicas.get("num_replicas", 1) != 1 or "autoscaling_config" in replicas
        if several and self.database.url.startswith("sqlite"):
            raise ValueError("several ingress replicas need a database.url of PostgreSQL: SQLite is for one")
        limits = self.limits
        for low, high in (
            ("max_images", "max_pending"),
            ("max_images", "max_pending_per_key"),
            ("max_megapixel_steps", "megapixel_steps_per_minute"),
        ):
            if getattr(limits, high) is not None and getattr(limits, low) > getattr(limits, high):
                raise ValueError(f"limits.{low} is above limits.{high}: such a request could never run")
        for model in self.models:
            defaults = model.defaults
            pixels = defaults.width * defaults.height
            for what, value, limit in (
                ("number of steps", defaults.steps, "max_steps"),
                ("guidance", model.guidance_scale(editing=False), "max_guidance_scale"),
                ("guidance of edits", model.guidance_scale(editing=True), "max_guidance_scale"),
                ("size", pixels, "max_pixels"),
                ("image's work", pixels * defaults.steps / 1e6, "max_megapixel_steps"),
            ):
                if value > getattr(limits, limit):
                    raise ValueError(f"the default {what} of {model.name} is above limits.{limit}")
        return self
