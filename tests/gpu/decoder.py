"""The decoder at the released model's full size, with random weights.

    python -m tests.gpu.decoder

Nothing is downloaded; it takes about 30 GB of GPU memory. `--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deployments import acceleration
from deployments.calls import Call
from deployments.config import Acceleration, DecoderConfig
from deployments.errors import OutOfMemoryError
from deployments.glm_image.decoder import Decoder
from deployments.glm_image.pipeline import DecoderPipeline
from deployments.types import DecodeRequest, PriorTokens
from tests.gpu import models

if TYPE_CHECKING:
    from deployments.types import Pixels


def load(options: argparse.Namespace, side: int, **chosen: Any) -> Decoder:
    config = DecoderConfig(
        device=options.device,
        deployment={"ray_actor_options": {"num_gpus": 1}},
        acceleration=Acceleration(**chosen),
    )
    pipeline = DecoderPipeline(**copy.deepcopy(options.components))
    acceleration.apply(pipeline, config, max_side=side)
    return Decoder(pipeline)


def unit(options: argparse.Namespace, side: int, *, seed: int = 0) -> DecodeRequest:
    codebook = 256 if options.tiny else models.CODEBOOK
    tokens = np.random.default_rng(seed).integers(0, codebook, (side // 32, side // 32))
    return DecodeRequest(
        prompt="A red boat at dawn",
        width=side,
        height=side,
        seed=seed,
        steps=options.steps,
        guidance_scale=1.5,
        prior=PriorTokens(target=tokens),
    )


def seconds(decoder: Decoder, request: DecodeRequest, runs: int) -> float:
    decoder.decode(replace(request, steps=2), Call())
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        decoder.decode(request, Call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "the CPU"
    print(f"on {name}, {options.side}x{options.side}, {options.steps} steps, medians of {options.runs} runs")

    options.components = models.decoder(tiny_size=options.tiny)
    request = unit(options, options.side)
    images: dict[str, Pixels] = {}
    for title, chosen in (
        ("plain", {}),
        ("compiled", {"compile": True}),
        ("fp8 weights", {"quantization": "fp8"}),
        ("step cache 0.1", {"step_cache": 0.1}),
        ("flash attention", {"attention": "_native_flash"}),
        ("VAE in tiles", {"vae_tiling": True}),
    ):
        decoder = load(options, options.side, **chosen)
        took = seconds(decoder, request, options.runs)
        images[title] = decoder.decode(request, Call())
        apart = np.abs(images[title].astype(int) - images["plain"].astype(int)).mean()
        print(f"{title:16} {took:7.2f} s, mean difference from plain {apart:.3f} of 255")
        if title == "plain":
            previews = seconds(decoder, replace(request, previews=3), options.runs)
            print(f"{'3 previews':16} {100 * (previews - took) / took:7.1f} % more")
            decoder.decode(unit(options, options.side, seed=1), Call())
            same = np.array_equal(decoder.decode(request, Call()), images["plain"])
            print(f"same pixels alone and in company: {'yes' if same else 'NO'}")
        del decoder
        gc.collect()

    if on_gpu:
        for side in (1024, 2048):
            for chosen in ({}, {"vae_tiling": True}, {"offload": "model"}, {"offload": "group"}):
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    load(options, side, **chosen).decode(replace(unit(options, side), steps=2), Call())
                except OutOfMemoryError as error:
                    print(f"{side}x{side} {chosen}: {error}")
                else:
                    peak = torch.cuda.max_memory_allocated() / 1e9
                    print(f"{side}x{side} {chosen or 'plain'}: peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
