"""The configuration: `args` of the application in a Serve config file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, HttpUrl, model_validator

from deployments.config import ChatModelConfig, ClassifierConfig, Config, ModelConfig, StageConfig
from serve_app.home import NAME, ROOT


class Limits(Config):
    """Limits of requests."""

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
        "default allows ten images of 2048×2048 with 50 steps.",
    )
    max_pending: int = Field(
        default=64,
        ge=1,
        description="Most unfinished images of requests, over all ingress replicas. More are rejected with a "
        "429 and `Retry-After`.",
    )
    max_pending_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Most unfinished images of one API key, or of all requests without a key. Unlimited if "
        "unset.",
    )
    megapixel_steps_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Most work of one API key a minute. The minute begins with a request. More is rejected "
        "with a 429 and `Retry-After`. Unlimited if unset.",
    )
    deadline_s: float = Field(
        default=580,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request may take, loading included. Then it gets a 504 and its work is "
        "stopped. OpenAI's Python client gives up after 600, and Node's `fetch` after 300.",
    )
    max_jobs: int = Field(
        default=1000,
        ge=1,
        description="Most unfinished jobs in the database. More are rejected with a 429.",
    )
    job_deadline_s: float = Field(
        default=3600,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one attempt of a job may take, loading included. Then the job fails.",
    )
    max_body_bytes: int = Field(
        default=64 * 2**20,
        ge=1024,
        description="Largest request body. A larger one is rejected while it arrives.",
    )
    max_json_bytes: int = Field(
        default=2**20,
        ge=1024,
        description="Largest JSON body without images: several times the longest prompt, escaped.",
    )
    max_bodies_bytes: int = Field(
        default=2**30,
        ge=1024,
        description="Most bytes of all request bodies together, for the duration of their requests. More are "
        "rejected with a 429.",
    )
    body_timeout_s: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a body must arrive. Then the request gets a 408.",
    )
    max_image_bytes: int = Field(default=50 * 2**20, ge=1024, description="Largest source image, as a file.")
    max_source_pixels: int = Field(
        default=2**25,
        ge=256,
        description="Most pixels of a source image, checked before it is decoded. Decoding takes up to 17 "
        "bytes a pixel, for one image at a time. A JPEG may have 16 times as many, and "
        "a progressive one twice as many: it is decoded at a half or a quarter of its size.",
    )
    max_source_side: int = Field(
        default=32_768, ge=16, description="Longest side of a source image, in pixels."
    )


Role = Literal["user", "operator"]


class APIKey(Config):
    """An API key: its SHA-256, or an environment variable that holds it."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of the key in the log.")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the key. `glm-image-server keys new NAME` makes a key and prints both.",
    )
    secret_env: str | None = Field(
        default=None,
        min_length=1,
        description="Environment variable that holds the key; an alternative to `sha256`.",
    )
    role: Role = Field(
        default="user",
        description="`user` or `operator`. An operator may also unload models, see the activity of all keys, "
        "and cancel their jobs.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.sha256 is None) == (self.secret_env is None):
            raise ValueError("give either sha256 or secret_env")
        return self


class AuthConfig(Config):
    """Authentication."""

    open: bool = Field(
        default=False,
        description="Whether requests need no key. `make serve` ignores it unless it listens on this machine "
        "only.",
    )
    api_keys: tuple[APIKey, ...] = Field(default=(), description="The valid keys.")
    keys_file: str | None = Field(
        default=None,
        min_length=1,
        description="File with more keys: a list in YAML, as in `api_keys`. It is read again every few "
        "seconds, so keys change without a restart.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="More names by which requests without a key may call the server. Addresses, `localhost`, "
        "this machine's name and that of `public_url` are always allowed.",
    )

    @property
    def has_keys(self) -> bool:
        """Whether there are keys, here or in a file."""
        return bool(self.api_keys or self.keys_file)

    @model_validator(mode="after")
    def _closed_or_meant(self) -> Self:
        ids = [key.id for key in self.api_keys]
        if len(set(ids)) < len(ids):
            raise ValueError(f"the ids of api_keys must be unique, not {ids}")
        if not self.has_keys and not self.open:
            raise ValueError(
                "there are no api_keys: make one with `python -m serve_app keys new NAME`, or set open: true "
                "to accept requests without a key"
            )
        return self


MAX_SIGNED_S = 604_800
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html"""


class StorageConfig(Config):
    """The file store."""

    url: str = Field(
        default_factory=lambda: str(ROOT / NAME / "files"),
        description="A folder, or another URL that fsspec writes to, such as `s3://bucket/prefix`. `{name}` "
        "stands for the application's name.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of fsspec's file system, such as `endpoint_url` for an S3 that is not Amazon's. "
        "Credentials come from the environment, `~/.aws` or the machine's role.",
    )
    presigned: bool = Field(
        default=False,
        description="Whether URLs in answers point to the object store, signed for `ttl_s`. Otherwise they "
        "point to `/files/` of this server.",
    )
    ttl_s: int = Field(default=7 * 86_400, ge=1, description="Seconds after which a file is deleted.")
    max_bytes: int = Field(
        default=20 * 2**30, ge=0, description="Most bytes of all files. Then the oldest ones are deleted."
    )
    min_free_bytes: int = Field(
        default=2**30,
        ge=0,
        description="Free bytes to leave on a folder's disk. With less, nothing is written, and requests for "
        "a `url` get a 507.",
    )

    @model_validator(mode="after")
    def _signs(self) -> Self:
        if self.presigned and not self.url.startswith("s3://"):
            raise ValueError("presigned needs an s3:// URL; other stores cannot sign")
        if self.presigned and self.ttl_s > MAX_SIGNED_S:
            raise ValueError(f"ttl_s is above {MAX_SIGNED_S}, the longest time for which S3 signs")
        return self


class DatabaseConfig(Config):
    """The database of jobs."""

    url: str = Field(
        default_factory=lambda: f"sqlite:///{ROOT / NAME}/jobs.db",
        pattern=r"^(sqlite:///.|postgresql://)",
        description="SQLAlchemy's URL of an SQLite file, `sqlite:///PATH`, or of a PostgreSQL database, "
        "`postgresql://USER@HOST/NAME`, which several ingress replicas may share. Missing parts come from "
        "the environment: `PGPASSWORD`, `PGPASSFILE`, …. `{name}` stands for the application's name.",
    )


class IngressConfig(Config):
    """The API plane."""

    deployment: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of its Ray Serve deployment, passed through: `num_replicas`, "
        "`ray_actor_options`, …. Several replicas need PostgreSQL and a shared file store.",
    )

    @property
    def has_several_replicas(self) -> bool:
        """Whether there may be more than one replica."""
        return self.deployment.get("num_replicas", 1) != 1 or "autoscaling_config" in self.deployment


HostPort = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[1-9][0-9]{0,4}$")]


class OutboundConfig(Config):
    """Connections on behalf of clients: for source images by URL, and for webhooks."""

    allow: tuple[HostPort, ...] = Field(
        default=(),
        description="Non-public `host:port` entries that may be reached, with the host as clients write it.",
    )
    timeout_s: float = Field(
        default=30,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a connection may take, redirects included.",
    )


class SafetyCheckerConfig(Config):
    """The safety checker of results, previews and source images."""

    classifier: ClassifierConfig = Field(
        default_factory=ClassifierConfig,
        description="The classifier, in a deployment of its own. It has the keys `deployment` to "
        "`cpu_threads` of `models[].prior`, and:",
    )
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="Score, 0 to 1, from which an image is flagged."
    )
    low_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Threshold of requests with `moderation: low` (OpenAI) or `enable_safety_checker: false` "
        "(fal, Pixazo). Their images are not checked if unset.",
    )
    on_failure: Literal["closed", "open"] = Field(
        default="closed",
        description="Policy for images that cannot be checked: `closed` fails their requests, `open` "
        "delivers them.",
    )
    timeout_s: float = Field(
        default=60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for one image, loading included. Then the image cannot be checked.",
    )


class EndpointConfig(Config):
    """A language model behind OpenAI's chat completions API."""

    base_url: HttpUrl = Field(
        description="Base URL; `/chat/completions` is appended. A non-public host must also be listed in "
        "`outbound.allow`."
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    key_env: str | None = Field(
        default=None, min_length=1, description="Environment variable that holds the key."
    )


class PromptExpanderConfig(Config):
    """The prompt expander: a chat model or an endpoint."""

    chat_model: ChatModelConfig | None = Field(
        default=None,
        description="A chat model in a deployment of its own. It has the keys `deployment` to `cpu_threads` "
        "of `models[].prior`, and:",
    )
    endpoint: EndpointConfig | None = Field(default=None, description="A language model on another server.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of a new prompt.")
    timeout_s: float = Field(
        default=30,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for one prompt, loading included. Then the prompt stays as it is.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.chat_model is None) == (self.endpoint is None):
            raise ValueError("give either chat_model or endpoint")
        return self


class ClusterConfig(Config):
    """The Ray cluster."""

    autoscaling: bool = Field(
        default=False,
        description="Whether nodes with GPUs come on demand. If not, a configuration that needs more GPUs "
        "than the cluster has is rejected at the start.",
    )


class AppConfig(Config):
    """The whole configuration of the application."""

    models: tuple[ModelConfig, ...] = Field(description="The models. The first one is the default.")
    auth: AuthConfig = Field(description="Authentication.")
    limits: Limits = Field(default_factory=Limits, description="Limits of requests.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="The Ray cluster.")
    storage: StorageConfig = Field(default_factory=StorageConfig, description="The file store.")
    database: DatabaseConfig = Field(default_factory=DatabaseConfig, description="The database of jobs.")
    ingress: IngressConfig = Field(default_factory=IngressConfig, description="The API plane.")
    outbound: OutboundConfig = Field(
        default_factory=OutboundConfig, description="Connections on behalf of clients."
    )
    safety_checker: SafetyCheckerConfig | None = Field(
        default=None, description="Safety checker. Disabled if unset; `{}` enables it with the defaults."
    )
    prompt_expander: PromptExpanderConfig | None = Field(
        default=None, description="Prompt expander. Disabled if unset."
    )
    public_url: HttpUrl | None = Field(
        default=None, description="Base of the URLs in answers. Defaults to the address that the client used."
    )

    wake_on_open: bool = Field(
        default=False,
        description="Whether the start of the server and opening the playground load the first model, before "
        "there is a request. It needs `auth.open`: the page itself requires no key.",
    )

    @model_validator(mode="after")
    def _wakes_for_users_only(self) -> Self:
        if self.wake_on_open and not self.auth.open:
            raise ValueError(
                "wake_on_open needs auth.open: anyone could load the model by opening the page; remove "
                "wake_on_open, or use min_replicas: 1"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models must not be empty, and their names must be unique, not {names}")
        if self.ingress.has_several_replicas and self.database.url.startswith("sqlite"):
            raise ValueError("several ingress replicas need a database.url of PostgreSQL; SQLite allows one")
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

    @property
    def stages(self) -> list[StageConfig]:
        """The configurations of all stages, those of helpers included."""
        stages: list[StageConfig] = [stage for model in self.models for stage in (model.prior, model.decoder)]
        if self.safety_checker:
            stages.append(self.safety_checker.classifier)
        if self.prompt_expander and self.prompt_expander.chat_model:
            stages.append(self.prompt_expander.chat_model)
        return stages

    def lacks_gpus(self, present: float) -> str | None:
        """Returns the problem if there are too few GPUs: Ray would wait for more endlessly.

        Args:
            present: number of GPUs that there are.
        """
        wanted = sum(stage.max_replicas * stage.num_gpus for stage in self.stages)
        if wanted <= present or self.cluster.autoscaling:
            return None
        return (
            f"The configuration asks for {wanted:g} GPUs, and there are {present:g}. "
            "Choose another configuration, reduce max_replicas or num_gpus, or set cluster.autoscaling: true "
            "where nodes come on demand."
        )
