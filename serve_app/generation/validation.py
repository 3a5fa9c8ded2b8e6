"""Whether a request may be run: the ranges of its parameters, and what its model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.config import MIN_STRENGTH
from deployments.families import GUIDANCE_PARAMETERS, PARAMETERS, Parameter
from serve_app.errors import InvalidParameter
from serve_app.generation.request import MAX_PARTIAL_IMAGES, MAX_SEED

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from serve_app.config import Limits
    from serve_app.generation.request import Generation, Resolved


def check(generation: Generation, model: ModelConfig, limits: Limits, *, sources: int, expands: bool) -> None:
    """Look at everything but the work of it all.

    Args:
        generation: its source images may be missing still.
        model: which is to make it.
        limits: what it may ask for.
        sources: how many source images there will be.
        expands: whether prompts can be expanded.

    Raises:
        InvalidParameter: a parameter is out of its range, or has no effect.
    """
    family = model.traits
    if not generation.prompt.strip():
        raise InvalidParameter("prompt", "must not be empty")
    for param, text in (
        ("prompt", generation.prompt),
        ("negative_prompt", generation.negative_prompt or ""),
    ):
        if len(text) > limits.max_prompt_chars:
            raise InvalidParameter(
                param,
                f"has {len(text)} characters; at most {limits.max_prompt_chars} are allowed",
                code="string_above_max_length",
            )
    width, height = generation.size or (model.defaults.width, model.defaults.height)
    if not family.is_legal_size(width, height):
        raise InvalidParameter("size", f"cannot be {width}x{height}; each side must be {family.legal_sides}")
    for param, value, least, most in (
        ("n", generation.n, 1, limits.max_images),
        ("steps", generation.steps, 1, limits.max_steps),
        ("guidance_scale", generation.guidance_scale, 0, limits.max_guidance_scale),
        ("strength", generation.strength, MIN_STRENGTH, 1),
        ("seed", generation.seed, 0, MAX_SEED),
        ("partial_images", generation.partial_images, 0, MAX_PARTIAL_IMAGES),
    ):
        if value is not None and not least <= value <= most:
            raise InvalidParameter(param, f"must be {least} to {most}, not {value!s:.50}")
    if generation.expand_prompt and not expands:
        raise InvalidParameter(
            "expand_prompt",
            "is not supported: the server has no prompt expander; leave it out, or set it to false",
            code="unsupported_parameter",
        )
    _check_taken(generation, model, editing=sources > 0)
    if sources > family.max_sources:
        raise InvalidParameter("sources", f"may be at most {family.max_sources}, not {sources}")


def _check_taken(generation: Generation, model: ModelConfig, *, editing: bool) -> None:
    """Refuse what the model would not look at.

    Raises:
        InvalidParameter: a parameter that has no effect.
    """
    family = model.traits
    scale = generation.guidance_scale
    if scale is None:
        scale = model.guidance_scale(editing=editing)
    reasons: dict[Parameter, str] = {}
    if scale <= family.guidance_off:
        problem = f"has no effect at guidance_scale {scale:g}, where guidance is off; leave it out"
        reasons |= dict.fromkeys(GUIDANCE_PARAMETERS, problem)
    if not editing:
        reasons["strength"] = "is of edits: there is no source image to paint over; leave it out"
    for param in PARAMETERS:
        if param not in family.parameters:
            reasons[param] = f"is not supported: {model.name} has none; leave it out"
        if getattr(generation, param) not in (None, False, "") and param in reasons:
            raise InvalidParameter(param, reasons[param], code="unsupported_parameter")


def work(generation: Resolved, limits: Limits) -> float:
    """In megapixels × denoising steps × images.

    Raises:
        InvalidParameter: it is more than one request may ask for.
    """
    width, height = generation.size
    if width * height > limits.max_pixels:
        raise InvalidParameter(
            "size",
            f"{width}x{height} has {width * height} pixels; at most {limits.max_pixels} are allowed",
        )
    work = width * height * generation.steps * generation.n / 1e6
    if work > limits.max_megapixel_steps:
        raise InvalidParameter(
            "n",
            f"is too large: {generation.n} images of {width}x{height} with {generation.steps} denoising "
            f"steps are {work:.0f} megapixel-steps, and a request may have {limits.max_megapixel_steps}; "
            "ask for fewer images or steps, or for a smaller size",
        )
    return work
