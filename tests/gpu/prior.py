"""The prior engine at the released model's full size, with random weights made on the GPU.

    python -m tests.gpu.prior

Nothing is downloaded; it takes about 30 GB of GPU memory. `--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import GlmImagePipeline

from deployments.calls import Call
from deployments.glm_image.language_model_gpu import GPULanguageModel
from deployments.glm_image.prior import PriorEngine, on_its_device
from deployments.types import PriorRequest
from tests.gpu import models

if TYPE_CHECKING:
    from deployments.types import TokenGrid

ROWS = 8
ROW_TOKENS = 24_576  # the default


def run(engine: PriorEngine, requests: list[PriorRequest]) -> tuple[list[TokenGrid], float]:
    """All requests together: their tokens and the seconds until the last one is done."""
    began = time.perf_counter()
    futures = [engine.submit(request, Call()) for request in requests]
    while not all(future.done() for future in futures):
        engine.step()
    return [future.result().target for future in futures], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    model, processor = models.prior(device, tiny_size=options.tiny)
    requests = [
        PriorRequest(prompt="A red boat at dawn", width=options.side, height=options.side, seed=seed)
        for seed in range(ROWS)
    ]

    pipeline = GlmImagePipeline(None, processor, None, model, None, None, None)
    began = time.perf_counter()
    pipeline.generate_prior_tokens(
        requests[0].prompt, 512, 512, generator=torch.Generator(device).manual_seed(0)
    )
    upstream = 512 / (time.perf_counter() - began)

    began = time.perf_counter()
    language_model = on_its_device(model, ROWS, ROW_TOKENS)
    engine = PriorEngine(model, processor, language_model)
    print(f"on {torch.cuda.get_device_name(device) if on_gpu else 'the CPU'}, medians of {options.runs} runs")
    print(f"compiled and captured in {time.perf_counter() - began:.1f} s")
    tokens = 16 * 16 + (options.side // 32) ** 2  # the preview grid, then the target grid
    print(f"{'':34} {'seconds':>8} {'tokens/s':>9} {'images/min':>11}")
    print(f"{'upstream, one, 512x512':34} {512 / upstream:8.2f} {upstream:9.0f}")

    def row(name: str, count: int) -> None:
        times = [run(engine, requests[:count])[1] for _ in range(options.runs)]
        seconds = statistics.median(times)
        print(f"{name:34} {seconds:8.2f} {count * tokens / seconds:9.0f} {60 * count / seconds:11.1f}")

    run(engine, requests[:1])
    for count in (1, 2, 4, 8):
        row(f"here, {count} at once", count)
    if isinstance(language_model, GPULanguageModel):
        language_model._graph = None
        for count in (1, 8):
            row(f"here, {count} at once, without the graph", count)
        language_model._graph = language_model._capture()
    if on_gpu:
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")

    together, _ = run(engine, requests)
    alone = [run(engine, [request])[0][0] for request in requests[:3]]
    same = all(np.array_equal(a, b) for a, b in zip(alone, together, strict=False))
    print(f"same tokens alone and in company: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
