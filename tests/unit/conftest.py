from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.families.glm_image import tiny

ON_CPU = DecoderConfig(device="cpu", dtype="float32")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return tiny.cached()


@pytest.fixture(scope="session")
def model_config() -> Callable[..., ModelConfig]:
    """Makes the configuration of a GLM-Image on the CPU."""

    def make(checkpoint: str | Path = "tiny", revision: str | None = None) -> ModelConfig:
        return ModelConfig(
            name="m",
            family="glm_image",
            checkpoint=str(checkpoint),
            revision=revision,
            prior=PriorConfig(device="cpu", dtype="float32"),
            decoder=ON_CPU,
        )

    return make


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs that `torch.compile` traces. Each runs as it is, without generated code."""
    traced: list[object] = []
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        traced.append(graph)
        return graph.forward

    def compile_traced(model: Any, *, options: object, **kwargs: Any) -> Any:
        return compile_(model, backend=backend, **kwargs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_traced)
    return traced
