"""The released model's sizes with random weights made on the device, or tiny ones to try a script with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from transformers import (
    ByT5Tokenizer,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from deployments.glm_image import tiny

CODEBOOK = 16_384


def prior(device: torch.device, *, tiny_size: bool) -> tuple[GlmImageForConditionalGeneration, Any]:
    """The autoregressive model and its processor; the released sizes are transformers' defaults."""
    if tiny_size:
        torch.manual_seed(0)
        processor = tiny._processor(tiny.TINY)
        return tiny._prior(tiny.TINY, processor).to(device).eval(), processor
    processor = tiny._processor(dataclasses.replace(tiny.TINY, codebook=CODEBOOK))
    config = GlmImageConfig(image_token_id=processor.image_token_id)
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    with device:
        model = GlmImageForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(
        do_sample=True, temperature=0.9, top_p=0.75, suppress_tokens=list(range(CODEBOOK, CODEBOOK + 128))
    )
    return model.eval(), processor


def decoder(*, tiny_size: bool) -> dict[str, Any]:
    """The components of the decoder's pipeline, on the CPU as they are loaded.

    Sizes: the released DiT's `config.json` (30 layers of 32 heads of 128 channels), ByT5-small's encoder, and
    a VAE of CogView4's sizes.
    """
    if tiny_size:
        parts = dict(tiny._pipeline(tiny.TINY).components)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        parts = {
            "tokenizer": ByT5Tokenizer(),
            "text_encoder": T5EncoderModel(
                T5Config(
                    vocab_size=384,
                    d_model=1472,
                    d_kv=64,
                    d_ff=3584,
                    num_layers=12,
                    num_heads=6,
                    feed_forward_proj="gated-gelu",
                )
            ),
            "transformer": GlmImageTransformer2DModel(attention_head_dim=128, num_attention_heads=32),
            "vae": AutoencoderKL(
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
            ),
            "scheduler": tiny._pipeline(tiny.TINY).scheduler,
        }
        torch.set_default_dtype(before)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(requires_grad=False)
    return parts | {"processor": None, "vision_language_encoder": None}
