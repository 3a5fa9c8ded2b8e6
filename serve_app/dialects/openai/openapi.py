"""The OpenAPI document of the OpenAI image API: bodies with this server's bounds, and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.config import MIN_STRENGTH
from deployments.families import GUIDANCE_PARAMETERS, PARAMETERS, Parameter
from serve_app.dialects.bodies import NOT_BLANK
from serve_app.dialects.openai.schemas import (
    QUALITIES,
    UNSUPPORTED,
    EditByReference,
    EditForm,
    EditInput,
    EditJobForm,
    GenerationInput,
    ImageInput,
    JobFields,
    JobRequest,
    errors,
)
from serve_app.generation.request import MAX_PARTIAL_IMAGES, MAX_SEED

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.generation.generator import Generator

Unset = tuple[str | bool | None, ...]
"""Values that leave a field out."""

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, or a stream of events if `stream` is true.",
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
"""Answers to generations and edits, by status."""
GENERATION_EXAMPLES = {
    "shortest": {"value": {"prompt": "A red boat at dawn"}},
    "reproducible": {"value": {"prompt": "A red boat at dawn", "n": 2, "seed": 7, "output_format": "webp"}},
    "stream": {"value": {"prompt": "A red boat at dawn", "stream": True, "partial_images": 2}},
}


def generation_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """Returns the JSON body of a generation."""
    schema = _schema(GenerationInput, generator, limits, unset=(None, "", False))
    return _body({"application/json": {"schema": schema, "examples": GENERATION_EXAMPLES}})


def edit_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """Returns the body of an edit: a form, or JSON."""
    return _form_or_json(EditForm, EditByReference, generator, limits)


def job_body(generator: Generator, limits: Limits) -> dict[str, Any]:
    """Returns the body of a job: a form, or JSON."""
    return _form_or_json(EditJobForm, JobRequest, generator, limits)


def _form_or_json(
    form_type: type[ImageInput], json_type: type[ImageInput], generator: Generator, limits: Limits
) -> dict[str, Any]:
    several = {
        "type": "array",
        "minItems": 1,
        "maxItems": max(model.traits.max_sources for model in generator.models()),
    }
    form = _schema(form_type, generator, limits, unset=("", False))
    form["properties"]["image"] = several | {
        "items": {"type": "string", "format": "binary"},
        "description": "PNG, JPEG or WebP. The field may also be called `image[]`.",
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
                    "description": "URL of a PNG, JPEG or WebP: http, https, or data with base64.",
                }
            },
            "required": ["image_url"],
            "additionalProperties": False,
        }
    }
    del by_reference["$defs"]
    return _body({"multipart/form-data": {"schema": form}, "application/json": {"schema": by_reference}})


def _body(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of an operation that FastAPI lacks, since the routes parse bodies themselves."""
    return {"requestBody": {"required": True, "content": content}}


def _schema(
    fields: type[ImageInput], generator: Generator, limits: Limits, *, unset: Unset
) -> dict[str, Any]:
    """Returns the schema of a body, with this server's bounds."""
    schema, models = fields.model_json_schema(), generator.models()
    bounds = _bounds(models, limits)
    for name, field in schema["properties"].items():
        if name == "prompt":
            field |= {"minLength": 1, "maxLength": limits.max_prompt_chars, "pattern": NOT_BLANK}
        elif "anyOf" in field:
            kind = field["anyOf"][0] | bounds.get(name, {})
            field["anyOf"] = [kind, {"enum": list(unset), "description": "Unset."}]
            del field["default"]
    taken = frozenset[Parameter]().union(*(model.traits.parameters for model in models))
    without = {name: f"Not supported: {reason}." for name, reason in UNSUPPORTED.items()}
    without |= {param: "No model supports it." for param in PARAMETERS if param not in taken}
    if not generator.expands_prompts:
        without["enable_prompt_expansion"] = "The server has no prompt expander."
    if not issubclass(fields, EditInput):
        without["strength"] = "For edits only."
    if issubclass(fields, JobFields):
        without["stream"] = "Follow the job's events."
    for name, reason in without.items():
        schema["properties"][name] = {"enum": list(unset), "description": reason}
    schema["allOf"] = _all_rules(fields, models, taken, limits, unset)
    return schema


def _bounds(models: list[ModelConfig], limits: Limits) -> dict[str, dict[str, Any]]:
    """Returns the bounds of fields, by name."""
    return {
        "model": {"enum": [model.name for model in models]},
        "n": {"minimum": 1, "maximum": limits.max_images},
        "size": {
            "format": "image-size",
            "examples": [f"{model.defaults.width}x{model.defaults.height}" for model in models],
        },
        "quality": {"enum": [word for word, (_, steps) in QUALITIES.items() if steps <= limits.max_steps]},
        "num_inference_steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance_scale": {"minimum": 0, "maximum": limits.max_guidance_scale},
        "negative_prompt": {"maxLength": limits.max_prompt_chars},
        "strength": {"minimum": MIN_STRENGTH, "maximum": 1},
        "partial_images": {"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
        "webhook_url": {"format": "webhook"},
    }


def _all_rules(
    fields: type[ImageInput],
    models: list[ModelConfig],
    taken: frozenset[Parameter],
    limits: Limits,
    unset: Unset,
) -> list[dict[str, Any]]:
    """Returns the rules over several fields of a body."""
    largest = MAX_SEED - limits.max_images + 1  # image i has the seed `seed` + i
    rules: list[dict[str, Any]] = [
        _either("output_compression", [100, *unset], "output_format", ["jpeg", "webp"]),
        {"anyOf": [_left_out("n", 1, *unset), {"properties": {"seed": {"maximum": largest}}}]},
    ]
    if issubclass(fields, JobRequest) and "strength" in taken:
        rules.append({"anyOf": [_left_out("strength", *unset), {"required": ["images"]}]})
    for model in models:
        rules += [_if_model(model, models, unset, rule) for rule in _rules(model, taken, unset)]
    if not issubclass(fields, JobFields):
        rules.append(_either("partial_images", [0, *unset], "stream", [True]))
    return rules


def _left_out(name: str, *values: Any) -> dict[str, Any]:
    """Returns the rule that a field is left out, or has one of these values."""
    return {"properties": {name: {"enum": list(values)}}}


def _either(name: str, values: list[Any], other: str, others: list[Any]) -> dict[str, Any]:
    """Returns the rule that a field has one of these values, or another field has one of those."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": values}}},
            {"properties": {other: {"enum": others}}, "required": [other]},
        ]
    }


def _rules(model: ModelConfig, taken: frozenset[Parameter], unset: Unset) -> list[dict[str, Any]]:
    """Returns the rules of a model's requests, for the parameters that some model takes."""
    family = model.traits
    guided: dict[str, Any] = {
        "properties": {"guidance_scale": {"type": "number", "exclusiveMinimum": family.guidance_off}},
        "required": ["guidance_scale"],
    }
    if min(model.guidance_scale(editing=editing) for editing in (False, True)) > family.guidance_off:
        guided = {"anyOf": [guided, _left_out("guidance_scale", *unset)]}
    return [
        *(_left_out(param, *unset) for param in sorted(taken - family.parameters)),
        *(
            {"anyOf": [_left_out(param, *unset), guided]}
            for param in sorted(family.parameters & GUIDANCE_PARAMETERS)
        ),
    ]


def _if_model(
    model: ModelConfig, models: list[ModelConfig], unset: Unset, rule: dict[str, Any]
) -> dict[str, Any]:
    """Returns the rule that `rule` holds, or that the request is for another model."""
    others: list[Any] = [other.name for other in models if other is not model]
    if not others:
        return rule
    if model is models[0]:
        another = {"properties": {"model": {"enum": others}}, "required": ["model"]}
    else:
        another = {"properties": {"model": {"enum": [*others, *unset]}}}
    return {"anyOf": [another, rule]}
