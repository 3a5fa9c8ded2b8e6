"""A small Z-Image checkpoint with random weights, made of the real classes. See `deployments.engines.tiny`.

`glm-image-server checkpoint tiny z_image FOLDER [--preset benchmark] [--text-layers 4 …]`
"""

from __future__ import annotations

import dataclasses

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from deployments.engines.tiny import TinyCheckpoint, chat_tokenizer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Configurable sizes of the random checkpoint. Everything else is derived or as released.

    Attributes:
        text_width: hidden size of the text encoder, a multiple of 4.
        text_layers: number of layers of the text encoder, at least 2.
        decoder_heads: number of attention heads of the DiT, each of 16 channels.
        decoder_layers: number of blocks of the DiT.
        vae_width: number of channels of the VAE's outermost block, a multiple of 4.
        seed: random seed of the weights.
    """

    text_width: int = 32
    text_layers: int = 3
    decoder_heads: int = 4
    decoder_layers: int = 2
    vae_width: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("text_layers", 2), ("decoder_heads", 1), ("decoder_layers", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("text_width", "vae_width"):
            if getattr(self, name) < 4 or getattr(self, name) % 4:
                raise ValueError(f"{name} must be a multiple of 4, not {getattr(self, name)}")


TINY = Sizes()
BENCHMARK = Sizes(text_width=512, text_layers=10, decoder_heads=16, decoder_layers=6)


def _pipeline(sizes: Sizes) -> ZImagePipeline:
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(sizes),
            text_encoder=_text_encoder(sizes, len(tokenizer)),
            tokenizer=tokenizer,
            transformer=_dit(sizes),
        )


def _text_encoder(sizes: Sizes, vocabulary: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=sizes.text_width,
            intermediate_size=3 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=max(8, sizes.text_width // 4),
        )
    )


def _dit(sizes: Sizes) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=16,
        dim=16 * sizes.decoder_heads,
        n_layers=sizes.decoder_layers,
        n_refiner_layers=1,
        n_heads=sizes.decoder_heads,
        n_kv_heads=sizes.decoder_heads,
        cap_feat_dim=sizes.text_width,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )


def _vae(sizes: Sizes) -> AutoencoderKL:
    width = sizes.vae_width
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,  # four blocks give the VAE a factor of 8
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, width, 2 * width, 2 * width),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


CHECKPOINT = TinyCheckpoint(
    __file__, {"tiny": TINY, "benchmark": BENCHMARK}, lambda sizes: (_pipeline(sizes),)
)
cached = CHECKPOINT.cached
write = CHECKPOINT.write
