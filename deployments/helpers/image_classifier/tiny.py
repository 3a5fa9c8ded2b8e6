"""A small classifier with random weights, made of the real classes. See `deployments.engines.tiny`.

`glm-image-server checkpoint tiny image_classifier FOLDER [--preset benchmark] [--layers 4 …]`
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from deployments.engines.tiny import TinyCheckpoint

LABELS = ("normal", "nsfw")
HEADS = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the random checkpoint. Everything else is derived from them or fixed.

    Attributes:
        width: hidden size, a multiple of 2.
        layers: number of layers, at least 1.
        side: side of its input images in pixels, a multiple of 16.
        seed: seed of the weights, at least 0.
    """

    width: int = 32
    layers: int = 2
    side: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, factor in (("width", HEADS), ("layers", 1), ("side", 16)):
            if getattr(self, name) < 1 or getattr(self, name) % factor:
                raise ValueError(f"{name} must be a multiple of {factor}, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")


TINY = Sizes()
BENCHMARK = Sizes(width=768, layers=12, side=224)
"""Size of ViT-Base, which common checkpoints have."""


def _make(sizes: Sizes) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    config = ViTConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * sizes.width,
        image_size=sizes.side,
        patch_size=16,
        id2label=dict(enumerate(LABELS)),
        label2id={label: id_ for id_, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = ViTForImageClassification(config)
    return model, ViTImageProcessorPil(size={"height": sizes.side, "width": sizes.side})


CHECKPOINT = TinyCheckpoint(__file__, {"tiny": TINY, "benchmark": BENCHMARK}, _make)
cached = CHECKPOINT.cached
write = CHECKPOINT.write
