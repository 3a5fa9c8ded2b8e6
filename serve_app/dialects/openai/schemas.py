"""The bodies of the OpenAI image API: fields of requests and of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from serve_app.dialects.bodies import HINT, PROMPT, Fields, JSONFields, document_errors
from serve_app.generation.request import (
    MAX_ID_CHARS,
    MAX_PARTIAL_IMAGES,
    MAX_SEED,
    ImageFormat,
    Moderation,
)
from serve_app.jobs.tables import Priority

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from serve_app.generation.delivery import Delivered
    from serve_app.generation.events import ImageFacts

MAX_FILES = 16
"""OpenAI's bound; a model may take fewer."""

Quality = Literal["low", "medium", "high", "xhigh", "max"]
QUALITIES: dict[str, tuple[Quality, int]] = {
    "low": ("low", 15),
    "medium": ("medium", 30),
    "standard": ("medium", 30),
    "high": ("high", 50),
    "hd": ("high", 50),
    "auto": ("high", 50),
    "xhigh": ("xhigh", 75),
    "max": ("max", 100),
}
"""For each word, the one in answers (which allow fewer words), and the denoising steps."""
MODERATION = "Strictness of the safety checker, if the server has one. Defaults to `auto`."


UNSUPPORTED = {  # fields of other servers that clients may send, and why they are rejected
    "mask": "the model edits the whole image; describe the change in the prompt",
    "markup": "the model edits the whole image; describe the change in the prompt",
    "svg": "images are PNG, JPEG or WebP",
    "frame_count": "images do not move",
    "frame_duration_ms": "images do not move",
}


class ImageInput(Fields):
    """Fields of generations and edits. Null, an empty text and false mean unset."""

    UNSUPPORTED: ClassVar[Mapping[str, str]] = UNSUPPORTED

    prompt: str = Field(description=PROMPT)
    model: str | None = Field(
        default=None, description="A name from `/v1/models`. Defaults to the first one."
    )
    n: int | None = Field(
        default=None,
        description="Number of images. Image i has the seed `seed` + i.",
    )
    size: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT` in pixels, or `auto`. `/v1/models` lists the legal sides.",
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None, description="Defaults to `url`. A stream is always base64, as OpenAI's is."
    )
    output_format: ImageFormat | None = Field(default=None, description="Defaults to `png`.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of JPEG and WebP, 0-100. Defaults to 100."
    )
    quality: Literal["low", "medium", "standard", "high", "hd", "auto", "xhigh", "max"] | None = Field(
        default=None,
        description="Denoising steps, unless `num_inference_steps` is set: low 15; medium, standard 30; "
        "high, hd, auto 50; xhigh 75; max 100. Defaults to the model's steps.",
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Classifier-free guidance; off at the model's `guidance_off` and below.",
    )
    negative_prompt: str | None = Field(
        default=None,
        description="Text that describes what to avoid. Rejected where guidance is off, since it would have "
        "no effect.",
    )
    cfg_normalization: bool | None = Field(
        default=None,
        description="Whether guidance may not lengthen the predicted velocity. Rejected where guidance is "
        "off.",
    )
    strength: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="For edits: share of the source image that is painted over. With 1 nothing of it is "
        "left.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Equal requests with equal seeds get equal images. Drawn if unset.",
    )
    enable_prompt_expansion: bool | None = Field(
        default=None, description="Whether a language model rewrites the prompt first."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description=HINT)
    complexity: Literal["low", "medium", "high"] | None = Field(default=None, description=HINT)
    user: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    safety_identifier: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    stream: bool | None = Field(
        default=None, description="Whether to send images as server-sent events, each when it is ready."
    )
    partial_images: int | None = Field(
        default=None, description=f"Previews of each image in a stream, 0 to {MAX_PARTIAL_IMAGES}."
    )


class _FromJSON(JSONFields):
    UNSET: ClassVar[tuple[bool | str | None, ...]] = (None, "", False)


class GenerationInput(_FromJSON, ImageInput):
    """The body of a generation."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)


class EditInput(ImageInput):
    """Fields of both kinds of edits."""

    input_fidelity: Literal["high", "low"] | None = Field(default=None, description=HINT)


class ImageReference(JSONFields):
    """A source image by its URL."""

    image_url: str


class EditByReference(_FromJSON, EditInput):
    """The body of an edit with source images by URL."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)
    images: list[ImageReference] = Field(min_length=1, max_length=MAX_FILES)


class EditForm(EditInput):
    """The fields of an edit's form, beside its files."""

    @field_validator("stream", "cfg_normalization", "enable_prompt_expansion", mode="before")
    @classmethod
    def _true_or_false(cls, text: str) -> bool:
        if text != "true":  # false is unset already; pydantic would also accept yes and on
            raise PydanticCustomError("bool", "Input should be true or false")
        return True


class JobFields(BaseModel):
    """Fields of a job, beside those of its generation or edit."""

    webhook_url: str | None = Field(
        default=None,
        description="URL to POST the job to when it has ended: http or https, at a public address.",
    )
    priority: Priority | None = Field(
        default=None, description="Jobs with `low` begin when no others wait. Defaults to `normal`."
    )
    start_within_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which the job fails if it has not begun.",
    )


class JobRequest(JobFields, _FromJSON, EditInput):
    """The body of a job: of a generation or, with `images`, of an edit."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)
    images: list[ImageReference] | None = Field(default=None, min_length=1, max_length=MAX_FILES)


class EditJobForm(JobFields, EditForm):
    """The fields of the form of an edit as a job, beside its files."""


class Image(BaseModel):
    """An image: its URL, or its file in base64."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str = Field(
        description="The prompt that was painted: as sent, or the new one if it was expanded."
    )
    seed: int = Field(description="Makes this image again, alone.")


class InputTokens(BaseModel):
    """Tokens read, by their kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prior stage, for all images together."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = Field(
        description="Tokens generated: those of the image, and of a smaller image before it."
    )
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer to generations and edits."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Image]
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Quality | None = Field(default=None, description="Set if it determined the steps.")
    output_format: ImageFormat
    usage: Usage


def usage(images: Collection[ImageFacts]) -> Usage:
    """Returns the sum of the images' tokens."""
    text = sum(image.text_tokens for image in images)
    source = sum(image.source_tokens for image in images)
    generated = sum(image.generated_tokens for image in images)
    return Usage(
        input_tokens=text + source,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=source),
        output_tokens=generated,
        total_tokens=text + source + generated,
    )


def images_response(
    made: Sequence[Delivered], quality: Quality | None, output_format: str, created: float
) -> ImagesResponse:
    """Returns the answer with these images."""
    first = made[0].record
    return ImagesResponse(
        created=int(created),
        data=[
            Image(
                url=one.url,
                b64_json=one.base64,
                revised_prompt=one.record.prompt,
                seed=one.record.seed,
            )
            for one in made
        ],
        size=f"{first.width}x{first.height}",
        quality=quality,
        output_format=output_format,
        usage=usage([one.record for one in made]),
    )


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


def error_type(status: int) -> ErrorType:
    """Returns the type of the errors of an HTTP status."""
    special: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}
    return special.get(status, "server_error" if status >= 500 else "invalid_request_error")


class Error(BaseModel):
    """The problem, and the remedy."""

    message: str
    type: ErrorType
    param: str | None = Field(default=None, description="The parameter at fault.")
    code: str


class ErrorResponse(BaseModel):
    """The answer to a request that fails."""

    error: Error


class Model(BaseModel):
    """A model and its abilities."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str
    description: str | None = Field(default=None, description="A text for people.")
    examples: list[str] = Field(description="Prompts that show what the model can do.")
    vocabulary: list[str] | None = Field(
        default=None, description="The words that it knows, if these are few. Otherwise it is not limited."
    )
    family: str
    identity: str = Field(
        description="Equal for models that give the same pixels for one request. A job is made by a model "
        "with the identity of the one that it was submitted to."
    )
    editing: bool
    max_source_images: int
    sizes: Sizes
    defaults: Defaults
    limits: Bounds
    guidance_off: float = Field(description="The largest guidance scale at which there is no guidance.")
    parameters: list[str] = Field(description="Parameters that have an effect.")
    safety_checker: bool = Field(
        description="Whether the server checks images. Without a check, no API reports findings."
    )
    prompt_expansion: bool = Field(description="Whether prompts can be expanded.")
    lossy_options: list[str] = Field(description="Options in use that change pixels.")
    speculation: Literal["auto", "off"] | int | None = Field(
        description="How many tokens of an image a pass of the prior stage may draw. A seed's tokens do not "
        "depend on other requests in any case. Null if the model draws no tokens."
    )


class Sizes(BaseModel):
    """Legal sides of an image, in pixels."""

    min: int
    max: int
    multiple_of: int


class Defaults(BaseModel):
    """Values of parameters that a request leaves out."""

    size: str
    num_inference_steps: int
    guidance_scale: float
    edit_guidance_scale: float
    strength: float | None = Field(default=None, description="Set if the model takes it.")


class Bounds(BaseModel):
    """Bounds of one request."""

    n: int
    num_inference_steps: int
    guidance_scale: float
    prompt_chars: int
    pixels: int = Field(description="Pixels of one image.")
    megapixel_steps: int = Field(description="Megapixels of an image × denoising steps × `n`.")


class Models(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns an answer in this API's envelope for each status, for the OpenAPI document."""
    return document_errors(ErrorResponse, *statuses)
