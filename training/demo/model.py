"""The components of the demo checkpoint: the real classes, at sizes that fit into a repository."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    T5Config,
    T5EncoderModel,
)

from deployments.families.glm_image import tiny
from training.demo import words
from training.demo.scenes import COLOURS, random_edit, random_scene

if TYPE_CHECKING:
    from training.demo.trainer import TrainingRun

PLAIN = len(COLOURS)
"""Number of plain codes, which are cells of one colour. They come first."""
GEOMETRIES = 36
PAIRS = torch.tensor([(a, b) for a in range(PLAIN) for b in range(PLAIN) if a != b])
"""Colours inside and outside of a geometry. The codes after the plain ones are pairs × geometries."""
CODEBOOK = PLAIN + len(PAIRS) * GEOMETRIES
WORDS = 200
LATENT_CHANNELS = 8
VISION_WIDTH = 64
PATCH = 16
"""Side of a cell in pixels, in the vision encoder's input."""


def processor() -> GlmImageProcessor:
    """Returns a processor whose ids are image tokens, bytes and the scenes' words, control tokens."""
    rng = random.Random(0)
    sentences = [random_scene(rng).sentence for _ in range(20_000)]
    sentences += [random_edit(rng)[1].sentence for _ in range(5_000)]
    learnt = Tokenizer(BPE())
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learnt.train_from_iterator(
        sentences,
        trainers.BpeTrainer(vocab_size=len(alphabet) + WORDS, initial_alphabet=alphabet, show_progress=False),
    )
    bpe = json.loads(learnt.to_str())["model"]
    tokens = [*tiny.vision_tokens(CODEBOOK), *sorted(bpe["vocab"], key=bpe["vocab"].get)]
    tokenizer = Tokenizer(
        BPE({token: id_ for id_, token in enumerate(tokens)}, merges=[tuple(pair) for pair in bpe["merges"]])
    )
    tokenizer.normalizer = words.normalizer(re.findall("[a-z]+", " ".join(sentences).lower()))
    return tiny.processor(tokenizer, CODEBOOK)


def write_processor(run: TrainingRun) -> None:
    """Writes the processor, which needs no training."""
    processor().save_pretrained(run.checkpoint / "processor")


def prior(processor: GlmImageProcessor) -> GlmImageForConditionalGeneration:
    """Returns the autoregressive model."""
    tokenizer = processor.tokenizer
    width, heads, layers = 192, 6, 6
    half = width // heads // 2
    model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            image_token_id=processor.image_token_id,
            image_start_token_id=CODEBOOK,
            image_end_token_id=CODEBOOK + 1,
            text_config={
                "vocab_size": len(tokenizer),
                "vision_vocab_size": CODEBOOK + tiny.VISION_SPECIAL_TOKENS,
                "hidden_size": width,
                "intermediate_size": 320,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": 2,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": CODEBOOK + 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 1.0,
                    # Time, rows and columns alternate, so that each has fast and slow frequencies.
                    "mrope_section": [1] * half,
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": VISION_WIDTH,
                "intermediate_size": 2 * VISION_WIDTH,
                "num_heads": 4,
                "patch_size": PATCH,
                "image_size": 8 * PATCH,  # positions are learnt for 8 cells per side, and interpolated
                "initializer_range": VISION_WIDTH**-0.5,
            },
            vq_config={
                "num_embeddings": CODEBOOK,
                "embed_dim": VISION_WIDTH,
                "latent_channels": VISION_WIDTH,
            },
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.98,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(range(CODEBOOK, CODEBOOK + tiny.VISION_SPECIAL_TOKENS)),
    )
    return model


def glyph_encoder() -> T5EncoderModel:
    """Returns a minimal glyph encoder, because the demo paints no words."""
    return T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))


def dit() -> GlmImageTransformer2DModel:
    """Returns the transformer of the decoder."""
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=96,  # wider heads distinguish a token more sharply from its neighbours
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=32,
        condition_dim=16,
        prior_vq_quantizer_codebook_size=CODEBOOK,
    )


def vae() -> AutoencoderKL:
    """Returns a VAE with the factor 8, like the released one."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 40, 40),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
