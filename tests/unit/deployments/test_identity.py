"""The identity of a model changes with its pixels, and with nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.config import ModelConfig, Speculation, gpu_window
from deployments.families.glm_image import tiny
from deployments.families.glm_image.checkpoint import DEMO

Make = Callable[..., ModelConfig]
COMMIT = "0" * 39 + "1"


def identity(model: ModelConfig, change: dict[str, Any]) -> str:
    """Returns the identity of a model with other options."""
    options = model.model_dump()
    for name, value in change.items():
        options[name] = options[name] | value if isinstance(value, dict) else value
    return ModelConfig.model_validate(options).identity


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.cached(), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "renamed"},
        {"defaults": {"steps": 3, "width": 512, "height": 512}},
        {"prior": {"max_batch_size": 2, "max_replicas": 3}},
        {"decoder": {"max_replicas": 3, "acceleration": {"compile": False}}},
        {"decoder": {"acceleration": {"attention": "native", "offload": "none"}}},
        {"prior": {"speculation": "off"}},
        {"prior": {"speculation": 4}},
    ],
    ids=str,
)
def test_it_does_not_change_with_what_leaves_pixels_alone(model_config: Make, change: dict[str, Any]) -> None:
    assert identity(model_config(), change) == model_config().identity


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "demo"},
        {"revision": COMMIT},
        {"prior": {"dtype": "bfloat16"}},
        {"prior": {"cpu_threads": 1}},
        {"decoder": {"dtype": "bfloat16"}},
        {"decoder": {"cpu_threads": 3}},
        {"decoder": {"acceleration": {"step_cache": 0.1}}},
        {"decoder": {"acceleration": {"compile": True}}},
        {"decoder": {"acceleration": {"attention": "sage"}}},
        {"decoder": {"acceleration": {"quantization": "fp8"}}},
        {"decoder": {"acceleration": {"vae_tiling": True}}},
    ],
    ids=str,
)
def test_it_changes_with_every_option_that_changes_pixels(model_config: Make, change: dict[str, Any]) -> None:
    assert identity(model_config(), change) != model_config().identity


def test_on_a_gpu_the_shape_of_a_pass_changes_the_rounding(model_config: Make) -> None:
    gpu = {"device": "cuda", "deployment": {"ray_actor_options": {"num_gpus": 1}}}
    auto, same, off, four, larger = (
        identity(model_config(), {"prior": gpu | shape})
        for shape in (
            {},
            {"speculation": 8},
            {"speculation": "off"},
            {"speculation": 4},
            {"speculation": 4, "max_batch_size": 16},
        )
    )
    assert auto == same
    assert len({auto, off, four, larger}) == 4


def test_without_drawn_tokens_no_pass_changes_the_rounding(model_config: Make) -> None:
    prior = {"device": "cuda", "deployment": {"ray_actor_options": {"num_gpus": 1}}}
    of_eight, of_four = (
        identity(model_config(), {"family": "z_image", "prior": prior | {"max_batch_size": size}})
        for size in (8, 4)
    )
    assert of_eight == of_four


@pytest.mark.parametrize(
    ("speculation", "requests", "window"),
    [("off", 8, 1), (5, 64, 5), ("auto", 1, 16), ("auto", 8, 8), ("auto", 24, 2), ("auto", 100, 1)],
)
def test_a_pass_on_a_gpu_reads_few_tokens_unless_told(
    speculation: Speculation, requests: int, window: int
) -> None:
    assert gpu_window(speculation, requests) == window


def test_a_folder_counts_by_its_content_and_not_by_its_path(model_config: Make, checkpoint: Path) -> None:
    moved = shutil.copytree(checkpoint, checkpoint.with_name("moved"))
    (moved / "README.md").write_text("notes")
    assert model_config(checkpoint=str(moved)).identity == model_config(checkpoint=str(checkpoint)).identity
    assert model_config(checkpoint=str(DEMO)).identity == model_config(checkpoint="demo").identity


def test_trained_weights_and_other_settings_are_another_model(model_config: Make, checkpoint: Path) -> None:
    before = model_config(checkpoint=str(checkpoint)).identity
    file = next((checkpoint / "transformer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    begins = max(tensor["data_offsets"][0] for name, tensor in tensors.items() if name != "__metadata__")
    data[8 + length + begins] ^= 1
    file.write_bytes(data)
    trained = model_config(checkpoint=str(checkpoint)).identity
    settings = checkpoint / "scheduler/scheduler_config.json"
    settings.write_text(
        settings.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 999')
    )
    assert len({before, trained, model_config(checkpoint=str(checkpoint)).identity}) == 3


def header(tensors: object) -> bytes:
    """Returns a file of safetensors that has only a header."""
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"short", b"\xff" * 64, header([]), header({"a": 1}), header({"a": {"data_offsets": ["b"]}})),
        *(header({"a": {"data_offsets": [at]}}) for at in (-1000, 2**80, 0.5)),
    ],
)
def test_a_broken_file_is_left_to_the_loader(model_config: Make, checkpoint: Path, content: bytes) -> None:
    file = next((checkpoint / "transformer").glob("*.safetensors"))
    file.write_bytes(content)
    assert model_config(checkpoint=str(checkpoint)).identity


def test_an_absent_folder_counts_by_its_name(model_config: Make) -> None:
    one, other = (model_config(checkpoint=f"/models/{name}").identity for name in "ab")
    assert one != other
