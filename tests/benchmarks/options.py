"""Measures costs and effects of each option of `decoder.acceleration` on this machine's CPU.

    python -m tests.benchmarks.options [--steps 20] [--side 512]

The model is the tiny checkpoint with random weights. The relative times do not apply to GPUs.
`python -m tests.gpu.window` measures those.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from deployments.config import DecoderConfig, Defaults, ModelConfig, PriorConfig
from deployments.families.glm_image.decoder import Decoder
from deployments.stages.calls import Call
from deployments.types import ImageRequest, Pixels, PriorTokens

PLAIN: dict[str, Any] = {}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"compile": True},
    {"attention": "_native_flash"},
    {"quantization": "fp8"},
    {"step_cache": 0.1},
)
TILED_SIDE, TILED_STEPS = 1536, 2
"""Size for tiling. The VAE's tiles have 1024 pixels per side, so smaller images have only one."""


def unit(side: int, steps: int) -> ImageRequest:
    """Returns a decoder request for a square image with random prior tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (side // 32, side // 32))
    return ImageRequest(
        prompt="A red boat at dawn",
        width=side,
        height=side,
        seed=0,
        steps=steps,
        guidance_scale=1.5,
        prior=PriorTokens(target=tokens),
    )


def paint(request: ImageRequest, options: dict[str, Any]) -> tuple[Pixels, float]:
    """Decodes a unit twice, and returns the pixels and the seconds of the second run."""
    stage = {"device": "cpu", "dtype": "float32", "cpu_threads": 1}
    model = ModelConfig(
        name="tiny",
        family="glm_image",
        checkpoint="tiny",
        defaults=Defaults(width=512, height=512),
        prior=PriorConfig.model_validate(stage),
        decoder=DecoderConfig.model_validate(stage | {"acceleration": options}),
    )
    decoder = Decoder.load(model)
    decoder.decode(request, Call())
    began = time.perf_counter()
    pixels = decoder.decode(request, Call())
    return pixels, time.perf_counter() - began


def main() -> None:
    """Prints a row for each option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="side of the images, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    requests = [
        (unit(arguments.side, arguments.steps), OPTIONS),
        (unit(TILED_SIDE, TILED_STEPS), ({"vae_tiling": True},)),
    ]
    for request, options in requests:
        size = f"{request.width}x{request.height}, {request.steps} steps"
        plain, seconds = paint(request, PLAIN)
        print(f"{size}: plain {seconds:.2f} s")
        for chosen in options:
            pixels, took = paint(request, chosen)
            apart = np.abs(pixels.astype(int) - plain.astype(int)).mean()
            print(f"  {chosen}: {took / seconds:.2f} times the seconds, mean difference {apart:.3f} of 255")


if __name__ == "__main__":
    main()
