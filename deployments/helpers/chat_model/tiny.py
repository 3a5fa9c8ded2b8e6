"""A small chat model with random weights, made of the real classes. See `deployments.engines.tiny`.

`glm-image-server checkpoint tiny chat_model FOLDER [--preset benchmark] [--layers 4 …]`
"""

from __future__ import annotations

import dataclasses
import string

import torch
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from deployments.engines.tiny import TinyCheckpoint, chat_tokenizer

HEADS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the random checkpoint. Everything else is derived from them or fixed.

    Attributes:
        width: hidden size, a multiple of 8.
        layers: number of layers, at least 1.
        seed: seed of the weights, at least 0.
    """

    width: int = 32
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width must be a multiple of 8, not {self.width}")
        for name, least in (("layers", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


TINY = Sizes()
BENCHMARK = Sizes(width=512, layers=10)


def _make(sizes: Sizes) -> tuple[Qwen3ForCausalLM, Qwen2Tokenizer]:
    tokenizer = chat_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=sizes.width // HEADS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        model = Qwen3ForCausalLM(config)
    # "Ġ" is how a BPE writes a space.
    letters = set(tokenizer.convert_tokens_to_ids([*string.ascii_lowercase, "Ġ"]))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Otherwise random weights would write bytes that are not text.
        suppress_tokens=[id_ for id_ in range(len(tokenizer)) if id_ not in letters],
    )
    return model, tokenizer


CHECKPOINT = TinyCheckpoint(__file__, {"tiny": TINY, "benchmark": BENCHMARK}, _make)
cached = CHECKPOINT.cached
write = CHECKPOINT.write
