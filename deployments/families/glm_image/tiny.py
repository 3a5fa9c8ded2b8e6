"""A small GLM-Image checkpoint with random weights, made of the real classes.

It has the folder layout of the released checkpoint and is loaded by the same code. So the real server runs
on a laptop. Its images are noise. `TINY` takes seconds and megabytes. `BENCHMARK` is large enough for
meaningful timings.

    glm-image-server checkpoint tiny glm_image FOLDER [--preset benchmark] [--prior-layers 4 …]
"""

from __future__ import annotations

import dataclasses

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from deployments.engines.tiny import TinyCheckpoint

VISION_SPECIAL_TOKENS = 2
"""Number of special image tokens: image start and end, the first ids after the codebook, as released."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ bos_token }}<|image|>{{ eos_token }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Configurable sizes of the random checkpoint. Everything else is derived or as released.

    Attributes:
        codebook: number of image tokens. Ids above it are special.
        prior_width: hidden size of the autoregressive language model, a multiple of 16 × `prior_heads`.
        prior_layers: number of layers of that model.
        prior_heads: number of attention heads of that model. A quarter of them (at least one) hold keys and
            values.
        vision_width: hidden size of the vision encoder, a multiple of 4.
        vision_layers: number of layers of the vision encoder.
        decoder_heads: number of attention heads of the DiT.
        decoder_head_channels: number of channels of each of these, a multiple of 4.
        decoder_layers: number of blocks of the DiT.
        glyph_width: hidden size of the glyph encoder, a multiple of 2.
        vae_width: number of channels of the VAE's outermost block, a multiple of 4.
        seed: random seed of the weights.
    """

    codebook: int = 256
    prior_width: int = 64
    prior_layers: int = 2
    prior_heads: int = 4
    vision_width: int = 32
    vision_layers: int = 2
    decoder_heads: int = 4
    decoder_head_channels: int = 16
    decoder_layers: int = 2
    glyph_width: int = 32
    vae_width: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "seed" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, not {getattr(self, field.name)}")
        for name, multiple in (
            ("prior_width", 16 * self.prior_heads),
            ("vision_width", 4),
            ("decoder_head_channels", 4),
            ("glyph_width", 2),
            ("vae_width", 4),
        ):
            if getattr(self, name) % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, not {getattr(self, name)}")


TINY = Sizes()
BENCHMARK = Sizes(
    codebook=1024,
    prior_width=512,
    prior_layers=10,
    prior_heads=8,
    decoder_heads=2,
    decoder_head_channels=128,  # like the released ones
    decoder_layers=6,
)
PRESETS = {"tiny": TINY, "benchmark": BENCHMARK}


def pipeline(sizes: Sizes) -> GlmImagePipeline:
    """Returns the whole checkpoint with random weights."""
    processor = processor_of(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        return GlmImagePipeline(
            tokenizer=ByT5Tokenizer(),
            processor=processor,
            text_encoder=_glyph_encoder(sizes),
            vision_language_encoder=prior(sizes, processor),
            vae=_vae(sizes),
            transformer=_dit(sizes),
            scheduler=scheduler(),
        )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler of the released checkpoint."""
    return FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )


def processor_of(sizes: Sizes) -> GlmImageProcessor:
    """Returns a processor whose ids are image tokens, single bytes (a BPE without merges), control tokens."""
    tokens = [*vision_tokens(sizes.codebook), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: id_ for id_, token in enumerate(tokens)}, merges=[]))
    return processor(tokenizer, sizes.codebook)


def vision_tokens(codebook: int) -> list[str]:
    """Returns the tokens for the ids of images, start and end last."""
    return [f"<|dit_token_{i}|>" for i in range(codebook + VISION_SPECIAL_TOKENS)]


def processor(tokenizer: Tokenizer, codebook: int) -> GlmImageProcessor:
    """Returns a processor like the released one.

    Args:
        tokenizer: byte-level tokenizer whose first ids are those of `vision_tokens`.
        codebook: number of image tokens.
    """
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    image_start, image_end = vision_tokens(codebook)[codebook:]
    return GlmImageProcessor(
        image_processor=GlmImageImageProcessorPil(
            patch_size=16,
            merge_size=1,
            temporal_patch_size=1,
            size={"shortest_edge": 512 * 512, "longest_edge": 2048 * 2048},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=image_start,
            eos_token=image_end,
            pad_token="<|endoftext|>",  # noqa: S106 - a text token, not a secret
            padding_side="left",
            extra_special_tokens={
                "image_token": "<|image|>",
                "grid_bos_token": "<sop>",
                "grid_eos_token": "<eop>",
            },
        ),
        chat_template=CHAT_TEMPLATE,
    )


def prior(sizes: Sizes, processor: GlmImageProcessor) -> GlmImageForConditionalGeneration:
    """Returns a prior model with random weights."""
    tokenizer = processor.tokenizer
    head = sizes.prior_width // sizes.prior_heads
    image_end = sizes.codebook + 1
    model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            image_token_id=processor.image_token_id,
            image_start_token_id=sizes.codebook,
            image_end_token_id=image_end,
            text_config={
                "vocab_size": len(tokenizer),
                "vision_vocab_size": sizes.codebook + VISION_SPECIAL_TOKENS,
                "hidden_size": sizes.prior_width,
                "intermediate_size": 3 * sizes.prior_width,
                "num_hidden_layers": sizes.prior_layers,
                "num_attention_heads": sizes.prior_heads,
                "num_key_value_heads": max(1, sizes.prior_heads // 4),
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": image_end,
                # The three sections, for time, rows and columns, add up to half a head.
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "mrope_section": [head // 8, head // 8, head // 4],
                },
            },
            vision_config={
                "depth": sizes.vision_layers,
                "hidden_size": sizes.vision_width,
                "intermediate_size": 2 * sizes.vision_width,
                "num_heads": 2,
                "patch_size": 16,
                "image_size": 2048,
            },
            vq_config={
                "num_embeddings": sizes.codebook,
                "embed_dim": sizes.vision_width,
                "latent_channels": sizes.vision_width,
            },
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.75,
        pad_token_id=tokenizer.pad_token_id,
        # With random weights, a special token would end the image in the middle of its grid.
        suppress_tokens=list(range(sizes.codebook, sizes.codebook + VISION_SPECIAL_TOKENS)),
    )
    return model


def _glyph_encoder(sizes: Sizes) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=sizes.glyph_width,
            d_kv=sizes.glyph_width // 2,
            d_ff=2 * sizes.glyph_width,
            num_layers=1,
            num_heads=2,
        )
    )


def _dit(sizes: Sizes) -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=sizes.decoder_layers,
        attention_head_dim=sizes.decoder_head_channels,
        num_attention_heads=sizes.decoder_heads,
        text_embed_dim=sizes.glyph_width,
        time_embed_dim=64,
        condition_dim=32,
        prior_vq_quantizer_codebook_size=sizes.codebook,
    )


def _vae(sizes: Sizes) -> AutoencoderKL:
    width = sizes.vae_width
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        # Four blocks give the VAE a factor of 8. With the DiT's patch of 2, one token covers 16×16 pixels.
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, width, 2 * width, 2 * width),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


CHECKPOINT = TinyCheckpoint(__file__, PRESETS, lambda sizes: (pipeline(sizes),))
cached = CHECKPOINT.cached
write = CHECKPOINT.write
