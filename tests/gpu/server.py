"""The whole server with both stages on one GPU: the memory that they use, and whether they release it.

    python -m tests.gpu.server

Serves a random checkpoint with configs/one-gpu.yaml. Requests images with cold and warm stages, unloads,
loads again, kills a decoder during an image, and lets the stages idle. Each image's line ends with the first
digits of its digest. `--device cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from deployments.families.glm_image import tiny
from tests.faults.conftest import Client
from tests.polling import until
from tests.serve.conftest import ROOT, config_file, served

IDLE_S = 10


def model(config: str, checkpoint: Path) -> dict[str, Any]:
    """Returns the model of a configuration, with another checkpoint and a short idle timeout."""
    applications = yaml.safe_load((ROOT / "configs" / config).read_text())["applications"]
    (ready,) = applications[0]["args"]["models"]
    stages = {name: ready[name] | {"idle_timeout_s": IDLE_S} for name in ("prior", "decoder")}
    changed: dict[str, Any] = ready | stages | {"checkpoint": str(checkpoint)}
    return changed


def _ask_driver(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return []
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def gpu_processes() -> set[str]:
    """Returns the ids of processes with memory on the GPU."""
    return set(_ask_driver("compute-apps=pid"))


def gpu_memory() -> str:
    """Returns the driver's count of memory in use, and the processes that use it."""
    used = ", ".join(_ask_driver("gpu=memory.used")) or "nothing"
    by = "; ".join(_ask_driver("compute-apps=pid,used_memory")) or "none"
    return f"{used} in use, by processes: {by}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="benchmark", choices=tiny.PRESETS, help="sizes of the checkpoint")
    parser.add_argument("--side", type=int, default=1024, help="side of the images, in pixels")
    parser.add_argument("--steps", type=int, default=100, help="steps of the image whose decoder is killed")
    options = parser.parse_args()
    config = "one-gpu.yaml" if options.device == "cuda" else "tiny.yaml"
    checkpoint = tiny.cached(tiny.PRESETS[options.preset])
    others = gpu_processes()
    print(f"before: {gpu_memory()}")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(config_file(Path(folder), [model(config, checkpoint)])) as running,
        Client(running) as client,
    ):
        check(client, others, options.side, options.steps)
    print(f"stopped: {gpu_memory()}")


def check(client: Client, others: set[str], side: int, steps: int) -> None:
    """Requests images from the server, and prints times, digests and memory."""

    def ask(seed: int, steps: int = 8) -> str:
        began = time.monotonic()
        answer = client.ask(seed=seed, size=f"{side}x{side}", num_inference_steps=steps).raise_for_status()
        seconds = time.monotonic() - began
        digest = hashlib.sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()
        return f"{seconds:.1f} s, {digest[:12]}"

    def is_idle() -> bool:
        return {stage["state"] for stage in client.stages("glm-image").values()} == {"unloaded"}

    print(f"first image, both stages cold: {ask(1)}")
    print(f"loaded: {gpu_memory()}")
    print(f"the same, warm: {ask(1)}")
    began = time.monotonic()
    client.get("/v1/internal/unload").raise_for_status()
    print(f"unloaded in {time.monotonic() - began:.2f} s: {gpu_memory()}")
    until(lambda: gpu_processes() <= others)
    print(f"all released {time.monotonic() - began:.2f} s after the request: {gpu_memory()}")
    print(f"the same, cold again: {ask(1)}")

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(ask, 2, steps)
        until(lambda: client.working() == ["decoder"])
        (decoder,) = client.running.replicas("glm-image-decoder")
        decoder.kill()
        print(f"a decoder killed during the image: {killed.result()}")
    print(f"the same, undisturbed: {ask(2, steps)}")
    began = time.monotonic()
    until(is_idle)
    print(f"idle for {time.monotonic() - began:.1f} s, unloaded: {gpu_memory()}")
    until(lambda: gpu_processes() <= others)
    print(f"all released {time.monotonic() - began:.1f} s after the last image: {gpu_memory()}")


if __name__ == "__main__":
    main()
