"""The bodies of the OpenAI image API: what is taken and answered, and how the OpenAPI document puts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from deployments.config import MIN_STRENGTH
from deployments.families import GUIDANCE_PARAMETERS, PARAMETERS, Parameter
from serve_app.dialects.bodies import NOT_BLANK, Fields, JSONFields, document_errors
from serve_app.generation import images
from serve_app.generation.request import MAX_ID_CHARS, MAX_PARTIAL_IMAGES, MAX_SEED, Moderation
from serve_app.jobs.store import Priority

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.generation.delivery import Delivered
    from serve_app.generation.generator import Generator

MAX_FILES = 16
"""OpenAI's own bound; what a model takes may be less."""

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
"""What an answer calls it, where three of the words are not allowed, and its denoising steps."""
HINT = "A hint without an effect here."
MODERATION = "How strictly images are checked, if the server has a safety checker; `auto` if unset."


UNSUPPORTED = {  # what OpenAI's or the documents' clients may send, and why it is refused
    "mask": "the model edits the whole image; say in the prompt what is to change",
    "markup": "the model edits the whole image; say in the prompt what is to change",
    "svg": "images are PNG, JPEG or WebP",
    "frame_count": "images do not move",
    "frame_duration_ms": "images do not move",
}


class ImageRequest(Fields):
    """What generations and edits have in common. Null, an empty text and false mean unset."""

    UNSUPPORTED: ClassVar[Mapping[str, str]] = UNSUPPORTED

    prompt: str = Field(description="What to paint. Put text that is to be rendered in quotation marks.")
    model: str | None = Field(default=None, description="A name from `/v1/models`; the first one if unset.")
    n: int | None = Field(
        default=None,
        description="How many images; image i has the seed `seed` + i; after the largest comes 0.",
    )
    size: str | None = Field(
        default=None, description="`WIDTHxHEIGHT` in pixels, or `auto`.", examples=["1024x1024"]
    )
    response_format: Literal["url", "b64_json"] | None = Field(
        default=None, description="`url` if unset; a stream is base64 whatever stands here, as OpenAI's is."
    )
    output_format: images.ImageFormat | None = Field(default=None, description="`png` if unset.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of JPEG and WebP, 0-100; 100 if unset."
    )
    quality: Literal["low", "medium", "standard", "high", "hd", "auto", "xhigh", "max"] | None = Field(
        default=None,
        description="Denoising steps, unless they are given: low 15; medium, standard 30; high, hd, auto 50; "
        "xhigh 75; max 100. The model's default if unset.",
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    num_inference_steps: int | None = Field(default=None, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Classifier-free guidance; off at the model's `guidance_off` and below.",
    )
    negative_prompt: str | None = Field(
        default=None, description="What not to paint. Refused where guidance is off, since nobody would look."
    )
    cfg_normalization: bool | None = Field(
        default=None, description="Whether guidance may not lengthen the predicted velocity; likewise."
    )
    strength: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="For edits: how much of the source image is painted over; with 1 nothing is left of it.",
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Equal requests with equal seeds get equal images."
    )
    enable_prompt_expansion: bool | None = Field(
        default=None, description="Whether the prompt is rewritten first, by a language model."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description=HINT)
    complexity: Literal["low", "medium", "high"] | None = Field(default=None, description=HINT)
    user: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    safety_identifier: str | None = Field(default=None, max_length=MAX_ID_CHARS, description=HINT)
    stream: bool | None = Field(
        default=None, description="Whether images are sent as server-sent events, each when it is ready."
    )
    partial_images: int | None = Field(
        default=None, description=f"Previews of each image in a stream, 0 to {MAX_PARTIAL_IMAGES}."
    )


class _FromJSON(JSONFields):
    UNSET: ClassVar[tuple[bool | str | None, ...]] = (None, "", False)


class GenerationRequest(_FromJSON, ImageRequest):
    """The body of a generation."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)


class EditRequest(ImageRequest):
    """What the two kinds of edits have in common."""

    input_fidelity: Literal["high", "low"] | None = Field(default=None, description=HINT)


class ImageReference(Fields):
    """Where a source image is."""

    image_url: str


class EditByReference(_FromJSON, EditRequest):
    """The body of an edit whose source images stand elsewhere."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)
    images: list[ImageReference] = Field(min_length=1, max_length=MAX_FILES)


class EditForm(EditRequest):
    """The fields of an edit, beside its files."""

    @field_validator("stream", "cfg_normalization", "enable_prompt_expansion", mode="before")
    @classmethod
    def _true_or_false(cls, text: str) -> bool:
        if text != "true":  # false is unset already; pydantic would take yes and on, too
            raise PydanticCustomError("bool", "Input should be true or false")
        return True


class JobFields(BaseModel):
    """What a job has beside its generation or edit."""

    webhook_url: str | None = Field(
        default=None,
        description="Where to POST the job when it has ended: http or https, at a public address.",
    )
    priority: Priority | None = Field(
        default=None, description="Jobs with `low` begin when there are no others; `normal` if unset."
    )
    start_within_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which it fails if it has not begun.",
    )


class JobRequest(JobFields, _FromJSON, EditRequest):
    """The body of a job: a generation's or, with `images`, an edit's."""

    moderation: Moderation | None = Field(default=None, description=MODERATION)
    images: list[ImageReference] | None = Field(default=None, min_length=1, max_length=MAX_FILES)


class EditJobForm(JobFields, EditForm):
    """The fields of an edit that is to be a job, beside its files."""


class Image(BaseModel):
    """One image: where it is, or what it is."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str = Field(
        description="The prompt that was painted: the one that was sent, or the new one if it was expanded."
    )
    seed: int = Field(description="Makes this image again, alone.")


class InputTokens(BaseModel):
    """What was read, by its kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prior stage, for all images together."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = Field(description="Drawn; beside those of the image a smaller one that leads to it.")
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer to generations and edits."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Image]
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Quality | None = Field(default=None, description="If the steps followed from it.")
    output_format: images.ImageFormat
    usage: Usage


def usage(images: Collection[Mapping[str, Any]]) -> Usage:
    """The sum of what images took: the fields of `GeneratedImage` that end in `_tokens`."""
    text, source, drawn = (
        sum(image[f"{kind}_tokens"] for image in images) for kind in ("text", "source", "drawn")
    )
    return Usage(
        input_tokens=text + source,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=source),
        output_tokens=drawn,
        total_tokens=text + source + drawn,
    )


def images_response(
    made: Sequence[Delivered], quality: Quality | None, output_format: str, created: float
) -> ImagesResponse:
    """The answer with these images."""
    first = made[0].facts
    return ImagesResponse(
        created=int(created),
        data=[
            Image(
                url=one.url,
                b64_json=one.base64,
                revised_prompt=one.facts["prompt"],
                seed=one.facts["seed"],
            )
            for one in made
        ],
        size=f"{first['width']}x{first['height']}",
        quality=quality,
        output_format=output_format,
        usage=usage([one.facts for one in made]),
    )


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


def error_type(status: int) -> ErrorType:
    """What this API calls the errors of an HTTP status."""
    special: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}
    return special.get(status, "server_error" if status >= 500 else "invalid_request_error")


class Error(BaseModel):
    """What is wrong, and what to do."""

    message: str
    type: ErrorType
    param: str | None = Field(default=None, description="The parameter at fault.")
    code: str


class ErrorResponse(BaseModel):
    """The answer to a request that fails."""

    error: Error


class Model(BaseModel):
    """A model and what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str
    description: str | None = Field(default=None, description="What people should know of it.")
    family: str
    editing: bool
    max_source_images: int
    sizes: Sizes
    defaults: Defaults
    limits: Bounds
    guidance_off: float = Field(description="The largest guidance scale at which there is no guidance.")
    parameters: list[str] = Field(description="What has an effect on its images and answers.")
    safety_checker: bool = Field(
        description="Whether images are checked; if not, nothing is found, whatever an API says of them."
    )
    prompt_expansion: bool = Field(description="Whether prompts can be expanded.")
    lossy_options: list[str] = Field(description="Those in use that change pixels.")


class Sizes(BaseModel):
    """Which sides an image may have, in pixels."""

    min: int
    max: int
    multiple_of: int


class Defaults(BaseModel):
    """What is taken where a request leaves it out."""

    size: str
    num_inference_steps: int
    guidance_scale: float
    edit_guidance_scale: float
    strength: float | None = Field(default=None, description="If the model takes it.")


class Bounds(BaseModel):
    """The most that one request may ask for."""

    n: int
    num_inference_steps: int
    guidance_scale: float
    prompt_chars: int
    pixels: int = Field(description="Of one image.")
    megapixel_steps: int = Field(description="Megapixels of an image × denoising steps × `n`.")


class Models(BaseModel):
    """The models that there are."""

    object: Literal["list"] = "list"
    data: list[Model]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: an answer in this API's envelope for each status."""
    return document_errors(ErrorResponse, *statuses)


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; a stream of events where `stream` is true.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "description": "One event; its data is JSON.",
                    "required": ["event", "data"],
                    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                }
            }
        },
    }
}
ANSWERS = _STREAM | errors(400, 404, 408, 413, 429, 500, 503, 504, 507)
"""To generations and edits, by status."""
GENERATION_EXAMPLES = {
    "shortest": {"value": {"prompt": "A red boat at dawn"}},
    "reproducible": {"value": {"prompt": "A red boat at dawn", "n": 2, "seed": 7, "output_format": "webp"}},
    "stream": {"value": {"prompt": "A red boat at dawn", "stream": True, "partial_images": 2}},
}


def generation_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """For the OpenAPI document: the JSON body of a generation."""
    schema = _schema(GenerationRequest, generator, limits, unset=(None, "", False))
    return _body({"application/json": {"schema": schema, "examples": GENERATION_EXAMPLES}})


def edit_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """For the OpenAPI document: an edit as a form, or as JSON."""
    return _form_or_json(EditForm, EditByReference, generator, limits)


def job_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """For the OpenAPI document: a job as a form, or as JSON."""
    return _form_or_json(EditJobForm, JobRequest, generator, limits)


def _form_or_json(
    form_type: type[ImageRequest], json_type: type[ImageRequest], generator: Generator, limits: Limits
) -> dict[str, Any]:
    several = {
        "type": "array",
        "minItems": 1,
        "maxItems": max(model.traits.max_sources for model in generator.models()),
    }
    form = _schema(form_type, generator, limits, unset=("", False))
    form["properties"]["image"] = several | {
        "items": {"type": "string", "format": "binary"},
        "description": "PNG, JPEG or WebP; also as `image[]`.",
    }
    form["required"].append("image")
    by_reference = _schema(json_type, generator, limits, unset=(None, "", False))
    by_reference["properties"]["images"] = several | {
        "items": {
            "type": "object",
            "properties": {
                "image_url": {
                    "type": "string",
                    "format": "uri",
                    "description": "Of a PNG, JPEG or WebP: http, https, or data with base64.",
                }
            },
            "required": ["image_url"],
            "additionalProperties": False,
        }
    }
    del by_reference["$defs"]
    return _body({"multipart/form-data": {"schema": form}, "application/json": {"schema": by_reference}})


def _body(content: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI cannot know, since the routes parse bodies themselves."""
    return {"requestBody": {"required": True, "content": content}}


def _schema(
    fields: type[ImageRequest],
    generator: Generator,
    limits: Limits,
    *,
    unset: tuple[str | bool | None, ...],
) -> dict[str, Any]:
    """The schema of a body, with this server's own bounds."""
    schema, models = fields.model_json_schema(), generator.models()
    bounds: dict[str, dict[str, Any]] = {
        "model": {"enum": [model.name for model in models]},
        "n": {"minimum": 1, "maximum": limits.max_images},
        "size": {"pattern": f"^(auto|{_sizes(models, limits)})$"},
        "quality": {"enum": [word for word, (_, steps) in QUALITIES.items() if steps <= limits.max_steps]},
        "num_inference_steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance_scale": {"minimum": 0, "maximum": limits.max_guidance_scale},
        "negative_prompt": {"maxLength": limits.max_prompt_chars},
        "strength": {"minimum": MIN_STRENGTH, "maximum": 1},
        "partial_images": {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
        "webhook_url": {"format": "webhook"},
    }
    for name, field in schema["properties"].items():
        if name == "prompt":
            field |= {"minLength": 1, "maxLength": limits.max_prompt_chars, "pattern": NOT_BLANK}
        elif "anyOf" in field:
            kind = field["anyOf"][0] | bounds.get(name, {})
            field["anyOf"] = [kind, {"enum": list(unset), "description": "Unset."}]
            del field["default"]
    schema["properties"] |= {
        name: {"enum": list(unset), "description": f"Not supported: {reason}."}
        for name, reason in UNSUPPORTED.items()
    }
    schema["allOf"] = [_either("output_compression", [100, *unset], "output_format", ["jpeg", "webp"])]
    taken = frozenset[Parameter]().union(*(model.traits.parameters for model in models))
    for param in PARAMETERS:
        if param not in taken:
            schema["properties"][param] = {"enum": list(unset), "description": "No model takes it."}
    if not generator.expands_prompts:
        no_expander = {"enum": list(unset), "description": "The server has no prompt expander."}
        schema["properties"]["enable_prompt_expansion"] = no_expander
    if not issubclass(fields, EditRequest):
        schema["properties"]["strength"] = {"enum": list(unset), "description": "Of edits."}
    elif issubclass(fields, JobRequest) and "strength" in taken:
        schema["allOf"].append(
            {"anyOf": [{"properties": {"strength": {"enum": list(unset)}}}, {"required": ["images"]}]}
        )
    for model in models:
        schema["allOf"] += [_if_model(model, models, unset, rule) for rule in _rules(model, taken, unset)]
    if issubclass(fields, JobFields):
        schema["properties"]["stream"] = {"enum": list(unset), "description": "Follow the job's events."}
    else:
        schema["allOf"].append(_either("partial_images", [0, *unset], "stream", [True]))
    return schema


def _either(name: str, values: list[Any], other: str, others: list[Any]) -> dict[str, Any]:
    """One field has one of these values, or another field is there and has one of those."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": values}}},
            {"properties": {other: {"enum": others}}, "required": [other]},
        ]
    }


def _rules(
    model: ModelConfig, taken: frozenset[Parameter], unset: tuple[str | bool | None, ...]
) -> list[dict[str, Any]]:
    """What holds of this model's requests, of the parameters that are taken by some model."""
    family = model.traits

    def left_out(param: str) -> dict[str, Any]:
        return {"properties": {param: {"enum": list(unset)}}}

    guided: dict[str, Any] = {
        "properties": {"guidance_scale": {"type": "number", "exclusiveMinimum": family.guidance_off}},
        "required": ["guidance_scale"],
    }
    if min(model.guidance_scale(editing=editing) for editing in (False, True)) > family.guidance_off:
        guided = {"anyOf": [guided, left_out("guidance_scale")]}
    return [
        *(left_out(param) for param in sorted(taken - family.parameters)),
        *({"anyOf": [left_out(param), guided]} for param in sorted(family.parameters & GUIDANCE_PARAMETERS)),
    ]


def _if_model(
    model: ModelConfig, models: list[ModelConfig], unset: tuple[str | bool | None, ...], rule: dict[str, Any]
) -> dict[str, Any]:
    """The rule holds, or another model is asked for."""
    others: list[Any] = [other.name for other in models if other is not model]
    if not others:
        return rule
    if model is models[0]:
        another = {"properties": {"model": {"enum": others}}, "required": ["model"]}
    else:
        another = {"properties": {"model": {"enum": [*others, *unset]}}}
    return {"anyOf": [another, rule]}


def _sizes(models: list[ModelConfig], limits: Limits) -> str:
    """A regular expression of the sizes that can be made, `WIDTHxHEIGHT`."""
    sides = sorted(
        {
            side
            for family in {model.traits for model in models}
            for side in range(family.min_side, family.max_side + 1, family.side_multiple)
        }
    )
    widths: dict[tuple[int, ...], list[int]] = {}
    for width in sides:
        heights = tuple(height for height in sides if width * height <= limits.max_pixels)
        if heights:
            widths.setdefault(heights, []).append(width)
    return "|".join(
        f"({'|'.join(map(str, several))})x({'|'.join(map(str, heights))})"
        for heights, several in widths.items()
    )
