"""The components of Z-Image that each stage loads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Model

from deployments.engines.acceleration import loading_device
from deployments.engines.checkpoint import load
from deployments.families.z_image import tiny
from deployments.families.z_image.pipeline import DecoderPipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig

PRIOR_COMPONENTS = {"tokenizer": Qwen2Tokenizer, "text_encoder": Qwen3Model}
DECODER_COMPONENTS = {
    "transformer": ZImageTransformer2DModel,
    "vae": AutoencoderKL,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
BUILT_IN = {"tiny": tiny.cached}


def load_prior(
    model: ModelConfig, report: Callable[[float], None] = lambda _: None
) -> tuple[Qwen3Model, Qwen2Tokenizer]:
    """Loads the text encoder onto its device, and its tokenizer.

    Args:
        model: configuration of the model.
        report: called with the share that is loaded, 0 to 1.

    Raises:
        CheckpointError: the checkpoint or one of the two components is missing or does not fit.
    """
    parts = load(
        model,
        PRIOR_COMPONENTS,
        report,
        built_in=BUILT_IN,
        device=lambda _: model.prior.device,
        dtype=model.prior.dtype,
    )
    return parts["text_encoder"], parts["tokenizer"]


def load_decoder(model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> DecoderPipeline:
    """Loads the pipeline without the text encoder, onto its device if the weights will stay there.

    Args:
        model: configuration of the model.
        report: called with the share that is loaded, 0 to 1.

    Raises:
        CheckpointError: the checkpoint or one of the components is missing or does not fit.
    """
    parts = load(
        model,
        DECODER_COMPONENTS,
        report,
        built_in=BUILT_IN,
        device=partial(loading_device, model.decoder),
        dtype=model.decoder.dtype,
    )
    return DecoderPipeline(**parts, text_encoder=None, tokenizer=None)
