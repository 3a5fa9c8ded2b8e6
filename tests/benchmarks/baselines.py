"""Common servers around `GlmImagePipeline`, as baselines for `tests.benchmarks.server`.

    python -m tests.benchmarks.baselines plain|batched CHECKPOINT PORT

Both use all CPUs. They accept `{"prompt", "seed"}` at `POST /generate`, and return a PNG in base64. It has
512x512 pixels and 4 steps.
"""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import TYPE_CHECKING, Any

import litserve
import torch
import uvicorn
from diffusers import GlmImagePipeline
from fastapi import FastAPI

from deployments.cpus import cpu_limit

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, STEPS = 512, 4


def pipeline(folder: str) -> GlmImagePipeline:
    torch.set_num_threads(cpu_limit())
    loaded = GlmImagePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(loaded: GlmImagePipeline, requests: list[dict[str, Any]]) -> list[Image]:
    images: list[Image] = loaded(
        prompt=[request["prompt"] for request in requests],
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(request["seed"]) for request in requests],
    ).images
    return images


def png(image: Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def plain(folder: str, port: int) -> None:
    """Serves one image at a time with FastAPI."""
    loaded, lock, app = pipeline(folder), threading.Lock(), FastAPI()

    @app.post("/generate")
    def answer(request: dict[str, Any]) -> dict[str, str]:
        with lock:
            return {"image": png(generate(loaded, [request])[0])}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


class Batched(litserve.LitAPI):  # type: ignore[misc]
    """LitServe with dynamic batching: the pipeline takes a list of prompts of one size."""

    def __init__(self, folder: str) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.1, api_path="/generate")
        self.folder = folder

    def setup(self, device: str) -> None:
        self.loaded = pipeline(self.folder)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[Image]:
        return generate(self.loaded, x)

    def unbatch(self, output: list[Image]) -> list[Image]:
        return output

    def encode_response(self, output: Image) -> dict[str, str]:
        return {"image": png(output)}


def batched(folder: str, port: int) -> None:
    server = litserve.LitServer(Batched(folder), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    kind, checkpoint_folder, port_number = sys.argv[1:]
    {"plain": plain, "batched": batched}[kind](checkpoint_folder, int(port_number))
