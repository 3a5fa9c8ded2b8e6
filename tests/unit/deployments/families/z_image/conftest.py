"""The configuration of a Z-Image model for tests on the CPU."""

from typing import Any

from deployments.config import DecoderConfig, Defaults, ModelConfig, PriorConfig

ON_CPU = DecoderConfig(device="cpu", dtype="float32")
ROWS = 4


def config(decoder: DecoderConfig = ON_CPU, **prior: Any) -> ModelConfig:
    return ModelConfig(
        name="z",
        family="z_image",
        checkpoint="tiny",
        defaults=Defaults(width=512, height=512),
        prior=PriorConfig(device="cpu", dtype="float32", max_batch_size=ROWS, **prior),
        decoder=decoder,
    )
