"""The released model with random weights from the device, or a tiny model for trying a script.

Sizes are those of the released configurations. A test may build fewer layers, without other differences.
Weights are equal in every process on the same kind of device.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)
from transformers.initialization import no_init_weights

from deployments.families.glm_image import tiny
from deployments.families.glm_image.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Iterator

CODEBOOK = 16_384
VISION_VOCABULARY = 16_512
"""Number of ids that the prior may generate: the codebook's, and special ids, two of which are used."""
PERIOD = 1_048_583
"""Number of random numbers, a prime. They are repeated, because drawing ten billion takes a CPU minutes."""


def prior(
    device: torch.device, *, tiny_size: bool = False, layers: int = 40, vision_layers: int = 40
) -> tuple[GlmImageForConditionalGeneration, Any]:
    """Returns the autoregressive model on the device, and its processor.

    Args:
        device: device of the weights.
        tiny_size: whether to build the model of `deployments.families.glm_image.tiny`.
        layers: layers of the language model.
        vision_layers: layers of the vision encoder.
    """
    if tiny_size:
        torch.manual_seed(0)
        processor = tiny.processor_of(tiny.TINY)
        return tiny.prior(tiny.TINY, processor).to(device).eval(), processor
    processor = tiny.processor_of(dataclasses.replace(tiny.TINY, codebook=CODEBOOK))
    config = GlmImageConfig(
        image_token_id=processor.image_token_id,
        text_config={
            "num_hidden_layers": layers,
            "pad_token_id": processor.tokenizer.pad_token_id,
            # transformers' defaults have no sections and rotate whole heads, which is inconsistent.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={"depth": vision_layers},
    )
    with device, no_init_weights():
        model = GlmImageForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        pad_token_id=processor.tokenizer.pad_token_id,
        # With random weights, special ids would end the image inside its grid.
        suppress_tokens=list(range(CODEBOOK, VISION_VOCABULARY)),
    )
    return _ready(model, device), processor


def decoder(
    device: torch.device, *, tiny_size: bool = False, layers: int = 30, glyph_layers: int = 12
) -> dict[str, Any]:
    """Returns the components of the decoder's pipeline, on the device.

    Args:
        device: device of the weights.
        tiny_size: whether to build the components of `deployments.families.glm_image.tiny`.
        layers: layers of the DiT.
        glyph_layers: layers of the glyph encoder, which is ByT5-small's.
    """
    parts: dict[str, Any] = {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": glyph_encoder(device, tiny_size=tiny_size, layers=glyph_layers),
        "transformer": dit(device, tiny_size=tiny_size, layers=layers),
        "vae": vae(device, tiny_size=tiny_size),
        "scheduler": tiny.scheduler(),
    }
    return parts | {"processor": None, "vision_language_encoder": None}


def dit(device: torch.device, *, tiny_size: bool = False, layers: int = 30) -> Transformer:
    """Returns the DiT."""
    if tiny_size:
        model = Transformer(**dict(_tiny("transformer").config))
    else:
        with device, _in_bfloat16(), no_init_weights():
            model = Transformer(num_layers=layers, attention_head_dim=128, num_attention_heads=32)
    ready: Transformer = _ready(model, device)
    return ready


def glyph_encoder(device: torch.device, *, tiny_size: bool = False, layers: int = 12) -> T5EncoderModel:
    """Returns the glyph encoder."""
    if tiny_size:
        return _ready(_tiny("text_encoder"), device)
    config = T5Config(
        vocab_size=384,
        d_model=1472,
        d_kv=64,
        d_ff=3584,
        num_layers=layers,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    with device, _in_bfloat16(), no_init_weights():
        model = T5EncoderModel(config)
    return _ready(model, device)


def vae(device: torch.device, *, tiny_size: bool = False) -> AutoencoderKL:
    """Returns the VAE, which has CogView4's sizes."""
    if tiny_size:
        return _ready(_tiny("vae"), device)
    with device, _in_bfloat16(), no_init_weights():
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 512, 1024, 1024),
            layers_per_block=3,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
        )
    return _ready(model, device)


def _tiny(name: str) -> Any:
    """Returns a component of the tiny pipeline."""
    return tiny.pipeline(tiny.TINY).components[name]


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Creates weights in bfloat16 within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _ready(model: Any, device: torch.device) -> Any:
    """Fills a model with random weights that keep activations near one, and prepares it for inference."""
    model = model.to(device).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(PERIOD, device=device, generator=generator)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1:
            scale = parameter[0].numel() ** -0.5
        elif name.endswith("bias"):
            scale = 0.02
        else:  # weights of a norm
            parameter.fill_(1)
            continue
        own = (scale * numbers.roll(7919 * index)).to(parameter.dtype)
        for part in parameter.view(-1).split(PERIOD):
            part.copy_(own[: len(part)])
    return model
