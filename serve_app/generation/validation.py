"""Validation of requests: the ranges of parameters, what the model takes, and the amount of work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.config import MIN_STRENGTH
from deployments.families import GUIDANCE_PARAMETERS, PARAMETERS, Parameter
from serve_app.errors import InvalidParameter
from serve_app.generation.request import MAX_PARTIAL_IMAGES, MAX_SEED

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.generation.request import GenerationRequest


def validate(request: GenerationRequest, model: ModelConfig, limits: Limits, *, expands: bool) -> None:
    """Checks every parameter, and that the model takes it.

    Source images are checked where they are decoded (`serve_app.generation.sources`), and the amount of work
    by `bounded_work`.

    Args:
        request: the request.
        model: its model.
        limits: limits of requests.
        expands: whether the server can expand prompts.

    Raises:
        InvalidParameter: a parameter is out of its range, or has no effect.
    """
    _check_texts(request, limits)
    family = model.traits
    # An edit without a size gets a legal one when its source image is decoded.
    width, height = request.size or (model.defaults.width, model.defaults.height)
    if not family.is_legal_size(width, height):
        raise InvalidParameter("size", f"cannot be {width}x{height}; each side must be {family.legal_sides}")
    for param, value, least, most in (
        ("n", request.n, 1, limits.max_images),
        ("steps", request.steps, 1, limits.max_steps),
        ("guidance_scale", request.guidance_scale, 0, limits.max_guidance_scale),
        ("strength", request.strength, MIN_STRENGTH, 1),
        # The last image's seed is `seed` + n - 1.
        ("seed", request.seed, 0, MAX_SEED - request.n + 1),
        ("partial_images", request.partial_images, 0, MAX_PARTIAL_IMAGES),
    ):
        if value is not None and not least <= value <= most:
            raise InvalidParameter(param, f"must be {least} to {most}, not {value!s:.50}")
    if request.expand_prompt and not expands:
        raise InvalidParameter(
            "expand_prompt",
            "is not supported: the server has no prompt expander; remove it, or set it to false",
            code="unsupported_parameter",
        )
    _check_effects(request, model)
    if len(request.sources) > family.max_sources:
        raise InvalidParameter(
            "sources", f"has {len(request.sources)} images; {model.name} takes at most {family.max_sources}"
        )


def _check_texts(request: GenerationRequest, limits: Limits) -> None:
    if not request.prompt.strip():
        raise InvalidParameter("prompt", "must not be empty")
    for param, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise InvalidParameter(
                param,
                f"has {len(text)} characters; at most {limits.max_prompt_chars} are allowed: shorten it",
                code="string_above_max_length",
            )


def _check_effects(request: GenerationRequest, model: ModelConfig) -> None:
    """Rejects parameters that would have no effect.

    Raises:
        InvalidParameter: one has none.
    """
    family, editing = model.traits, bool(request.sources)
    scale = request.guidance_scale
    if scale is None:
        scale = model.guidance_scale(editing=editing)
    reasons: dict[Parameter, str] = {}
    if scale <= family.guidance_off:
        problem = f"has no effect at guidance_scale {scale:g}, where guidance is off; remove it"
        reasons |= dict.fromkeys(GUIDANCE_PARAMETERS, problem)
    if not editing:
        reasons["strength"] = "applies only to edits, and this request has no source image; remove it"
    for param in PARAMETERS:
        if param not in family.parameters:
            reasons[param] = f"is not supported by {model.name}; remove it"
        if getattr(request, param) not in (None, False, "") and param in reasons:
            raise InvalidParameter(param, reasons[param], code="unsupported_parameter")


def bounded_work(request: GenerationRequest, model: ModelConfig, limits: Limits) -> float:
    """Returns the work of a request in megapixels × denoising steps × images.

    Raises:
        InvalidParameter: it is more than one request may ask for, or an image has more than
            `limits.max_pixels`.
    """
    width, height = request.size or (model.defaults.width, model.defaults.height)
    steps = request.steps or model.defaults.steps
    if width * height > limits.max_pixels:
        raise InvalidParameter(
            "size",
            f"{width}x{height} has {width * height} pixels; at most {limits.max_pixels} are allowed: "
            "choose a smaller one",
        )
    work = width * height * steps * request.n / 1e6
    if work > limits.max_megapixel_steps:
        raise InvalidParameter(
            "n",
            f"is too large: {request.n} images of {width}x{height} with {steps} denoising steps are "
            f"{work:.0f} megapixel-steps, and a request may have {limits.max_megapixel_steps}; ask for fewer "
            "images or steps, or for a smaller size",
        )
    return work
