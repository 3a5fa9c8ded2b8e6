"""The whole server with both stages on one GPU: what they take of it, and that they give it back.

    python -m tests.gpu.server

Serves a random checkpoint over HTTP, asks for images with cold and with warm stages, unloads, loads again,
kills a decoder in the middle of an image, and lets the stages idle. Behind each image stand the first digits
of its bytes' digest. `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from deployments.glm_image import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE_S = 10


def config(device: str, checkpoint: Path) -> dict[str, Any]:
    """As configs/one-gpu.yaml, half of the GPU each."""
    resources: dict[str, Any] = {"num_gpus": 0.5, "num_cpus": 1} if device == "cuda" else {"num_cpus": 0}
    stage = {
        "device": device,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "idle_timeout_s": IDLE_S,
        "deployment": {"ray_actor_options": resources},
    }
    model = {"name": "glm-image", "family": "glm_image", "checkpoint": str(checkpoint)}
    args = {"auth": {"open": True}, "models": [model | {"prior": stage, "decoder": stage}]}
    app = {"name": "glm-image", "route_prefix": "/", "import_path": "serve_app.app:build_app", "args": args}
    return {"http_options": {"host": "127.0.0.1"}, "applications": [app]}


def _ask_driver(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return []
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def gpu_processes() -> set[str]:
    """Which have memory on the GPU."""
    return set(_ask_driver("compute-apps=pid"))


def gpu_memory() -> str:
    """What the driver says is in use, and by which processes."""
    used = ", ".join(_ask_driver("gpu=memory.used")) or "nothing"
    by = "; ".join(_ask_driver("compute-apps=pid,used_memory")) or "none"
    return f"{used} in use, by processes: {by}"


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it held."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError
        time.sleep(0.05)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="benchmark", choices=tiny.PRESETS, help="the checkpoint's sizes")
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=100, help="of the image whose decoder is killed")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(yaml.safe_dump(config(options.device, tiny.cached(tiny.PRESETS[options.preset]))))
        others = gpu_processes()
        print(f"before: {gpu_memory()}")
        server = subprocess.Popen(
            [sys.executable, "-m", "serve_app", str(file), "--port", str(port)], cwd=scratch
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
                check(http, server, others, options)
        finally:
            server.terminate()
            server.wait(120)
        print(f"stopped: {gpu_memory()}")


def check(
    http: httpx.Client, server: subprocess.Popen[bytes], others: set[str], options: argparse.Namespace
) -> None:
    def answers() -> bool:
        try:
            return http.get("/readyz").status_code == 200
        except httpx.TransportError:
            if server.poll() is not None:
                raise SystemExit("the server has ended") from None
            return False

    def states() -> set[str]:
        stages = http.get("/health").json()["models"]["glm-image"].values()
        return {stage["state"] for stage in stages}

    def ask(seed: int, steps: int = 8) -> tuple[float, str]:
        size = f"{options.side}x{options.side}"
        body = {"prompt": "a boat", "size": size, "seed": seed, "num_inference_steps": steps}
        began = time.monotonic()
        answer = http.post(
            "/v1/images/generations", json=body | {"response_format": "b64_json"}
        ).raise_for_status()
        digest = hashlib.sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()[:12]
        return time.monotonic() - began, digest

    print(f"address after {until(answers, 120):.1f} s: {gpu_memory()}")
    print("first image, both stages cold: {:.1f} s, {}".format(*ask(1)))
    print(f"loaded: {gpu_memory()}")
    print("the same, warm: {:.1f} s, {}".format(*ask(1)))
    began = time.monotonic()
    http.get("/v1/internal/unload").raise_for_status()
    print(f"unloaded in {time.monotonic() - began:.2f} s: {gpu_memory()}")
    until(lambda: gpu_processes() <= others, 60)
    print(f"all given back {time.monotonic() - began:.2f} s after it was asked: {gpu_memory()}")
    print("the same, cold again: {:.1f} s, {}".format(*ask(1)))

    came: list[tuple[float, str]] = []
    asking = threading.Thread(target=lambda: came.append(ask(2, options.steps)))
    asking.start()
    until(lambda: any(u["stage"] == "decoder" for u in http.get("/v1/internal/status").json()["units"]), 60)
    (decoder,) = (
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "glm-image-decoder" in " ".join(process.cmdline())
    )
    decoder.kill()
    asking.join()
    print("a decoder killed in the middle: {:.1f} s, {}".format(*came[0]))
    print("the same, undisturbed: {:.1f} s, {}".format(*ask(2, options.steps)))
    idle_s = until(lambda: states() == {"unloaded"}, 90)
    print(f"idle for {idle_s:.1f} s, unloaded: {gpu_memory()}")
    print(f"all given back {until(lambda: gpu_processes() <= others, 60):.1f} s later: {gpu_memory()}")


if __name__ == "__main__":
    main()
