"""The components of GLM-Image that each stage loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import ByT5Tokenizer, GlmImageForConditionalGeneration, GlmImageProcessor, T5EncoderModel

from deployments.engines.acceleration import loading_device
from deployments.engines.checkpoint import load
from deployments.families.glm_image import tiny
from deployments.families.glm_image.pipeline import DecoderPipeline
from deployments.families.glm_image.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig

PRIOR_COMPONENTS = {
    "processor": GlmImageProcessor,
    "vision_language_encoder": GlmImageForConditionalGeneration,
}
DECODER_COMPONENTS = {
    "tokenizer": ByT5Tokenizer,
    "text_encoder": T5EncoderModel,
    "transformer": Transformer,
    "vae": AutoencoderKL,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
DEMO = Path(__file__).parent / "demo/checkpoint"
BUILT_IN = {"tiny": tiny.cached, "demo": lambda: DEMO}


def load_prior(
    model: ModelConfig, report: Callable[[float], None] = lambda _: None
) -> tuple[GlmImageForConditionalGeneration, GlmImageProcessor]:
    """Loads the autoregressive model onto its device, and its processor.

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
    return parts["vision_language_encoder"], parts["processor"]


def load_decoder(model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> DecoderPipeline:
    """Loads the pipeline without the autoregressive model, onto its device if the weights will stay there.

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
    return DecoderPipeline(**parts, vision_language_encoder=None, processor=None)
