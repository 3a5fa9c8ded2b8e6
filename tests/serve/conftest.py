"""A server as a user starts it: `make serve` with the tiny checkpoint, real Ray, real HTTP."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import yaml
from diffusers import GlmImagePipeline
from PIL import Image

from deployments.families.glm_image import tiny
from deployments.types import Pixels
from tests.polling import until
from tests.upstream import mended

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
OTHER_SIZES = tiny.Sizes(
    codebook=128, prior_width=128, prior_layers=3, decoder_heads=2, decoder_layers=3, seed=7
)


SMALL_SIZES = tiny.Sizes(prior_layers=1, decoder_heads=1, decoder_layers=1, vae_width=4)
"""At 1280×1280 an image takes a fifth of the time of the tiny checkpoint's."""


@dataclass(frozen=True)
class Running:
    """What `make serve` runs.

    Attributes:
        url: what it printed as its address.
        log: everything it has printed so far, by the line.
        process: make, whose child is the server.
    """

    url: str
    log: list[str]
    process: psutil.Process

    def send_signal(self, sign: signal.Signals) -> None:
        (server,) = psutil.Process(self.process.pid).children()
        server.send_signal(sign)

    def logs(self) -> Path:
        """The folder of all that Ray has written."""
        (ingress, *_) = self.replicas("Ingress")
        return Path(ingress.environ()["RAY_TMPDIR"]) / "ray/session_latest/logs"

    def log_lines(self) -> Iterator[dict[str, object]]:
        """What Serve has written of the ingress to its own files."""
        for file in self.logs().glob("serve/replica_*Ingress*.log"):
            yield from (json.loads(line) for line in file.read_text().splitlines())

    def replicas(self, name: str) -> list[psutil.Process]:
        """The processes of a deployment or, by its model's name, of both stages."""
        return [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if name in _title(process)
        ]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


@dataclass(frozen=True)
class Server:
    """A running server. Its model `glm-image` is the tiny checkpoint, `other` one of other sizes.

    Attributes:
        url: what it printed as its address.
        printed: everything it printed until it was ready.
        running: the server.
        checkpoints: the folder of each model.
    """

    url: str
    printed: str
    running: Running
    checkpoints: dict[str, Path]


@pytest.fixture(scope="package")  # idle servers slow down the tests that have none
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    checkpoints = {"glm-image": tiny.cached(), "other": folder / "other-checkpoint"}
    tiny.write(checkpoints["other"], OTHER_SIZES)
    models = [
        tiny_model(name, checkpoint=str(folder), prior={"min_replicas": 1}, decoder={"min_replicas": 1})
        for name, folder in (("glm-image", "tiny"), ("other", checkpoints["other"]))
    ]
    with served(config_file(folder, models)) as running:
        until(lambda: stages(running.url) == {"ready"}, START_TIMEOUT_S)
        yield Server(running.url, "".join(running.log), running, checkpoints)


def tiny_model(
    name: str,
    *,
    checkpoint: str = "tiny",
    prior: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The model of configs/tiny.yaml with other settings."""
    (model,) = _tiny_config()["applications"][0]["args"]["models"]
    stages = {"prior": model["prior"] | (prior or {}), "decoder": model["decoder"] | (decoder or {})}
    changed: dict[str, Any] = model | stages | {"name": name, "checkpoint": checkpoint}
    return changed


def config_file(folder: Path, models: list[dict[str, Any]], **args: Any) -> Path:
    """configs/tiny.yaml with other models and settings, and files that go with the test."""
    config = _tiny_config()
    kept = {
        "storage": {"url": str(folder / "files")},
        "database": {"url": f"sqlite:///{folder}/jobs.db"},
    }
    config["applications"][0]["args"] |= {"models": models} | kept | args
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def _tiny_config() -> Any:
    return yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())


def stages(url: str, *, replicas: int = 1) -> set[str]:
    """The states of all stages of all models; those with fewer replicas ready are still loading."""
    models = httpx.get(f"{url}/health", timeout=10).json()["models"].values()
    return {
        "loading" if stage.get("replicas", replicas) < replicas else stage["state"]
        for model in models
        for stage in model.values()
    }


@contextmanager
def served(config: Path, *options: str, project: Path = ROOT, **environment: str) -> Iterator[Running]:
    """Run `make serve` in a project until the block ends; then, if it still runs, press Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    printed: list[str] = []
    ready = threading.Event()
    with (
        # Ray puts sockets there, whose paths may have at most 107 bytes.
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder,
        psutil.Popen(
            ["make", "serve", f"CONFIG={config}", f"PORT={port}", *options],
            cwd=project,
            env=os.environ | {"RAY_TMPDIR": ray_folder, "HF_HUB_OFFLINE": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C goes to a whole group
        ) as process,
    ):

        def pump() -> None:
            for line in process.stdout:
                printed.append(line)
                if line.startswith("  curl "):
                    ready.set()
            ready.set()  # it has ended

        pumping = threading.Thread(target=pump)
        pumping.start()
        family = []
        try:
            assert ready.wait(START_TIMEOUT_S), "".join(printed)
            assert process.poll() is None, "".join(printed)
            match = re.search(r"Serving on (https?://\S+?)[.,] ", "".join(printed))
            assert match
            family = psutil.Process(process.pid).children(recursive=True)
            yield Running(match[1], printed, process)
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, signal.SIGINT)
                process.wait(STOP_TIMEOUT_S)
            pumping.join()
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, "the server left processes behind"


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


class Upstream:
    """diffusers' own pipeline, whole, in this process: what the server's pixels are compared with."""

    def __init__(self, checkpoint: Path) -> None:
        torch.set_num_threads(1)  # as configs/tiny.yaml says
        self._pipeline = mended(GlmImagePipeline.from_pretrained(checkpoint, local_files_only=True))
        self._pipeline.set_progress_bar_config(disable=True)

    def __call__(
        self,
        prompt: str,
        width: int,
        height: int,
        *,
        seed: int,
        steps: int = 2,
        sources: tuple[Pixels, ...] = (),
    ) -> Pixels:
        result = self._pipeline(
            prompt,
            image=[Image.fromarray(source) for source in sources] or None,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(seed),
        )
        return np.asarray(result.images[0])


@pytest.fixture(scope="session")
def upstream() -> Callable[[Path], Upstream]:
    return functools.cache(Upstream)
