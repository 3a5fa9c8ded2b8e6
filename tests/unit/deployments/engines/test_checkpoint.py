"""A stage safely loads its own components and no others, and errors name the component."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmImageForConditionalGeneration

from deployments.config import ChatModelConfig, ClassifierConfig, ModelConfig
from deployments.errors import CheckpointError
from deployments.families.glm_image import checkpoint, tiny
from deployments.families.z_image import checkpoint as z_image
from deployments.helpers.chat_model.chat_model import ChatModel
from deployments.helpers.image_classifier.classifier import ImageClassifier

PRIOR = ("processor", "vision_language_encoder")
DECODER = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
Configure = Callable[..., ModelConfig]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny checkpoint, which the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def load(stage: str, config: ModelConfig) -> object:
    return checkpoint.load_prior(config) if stage == "prior" else checkpoint.load_decoder(config)


@pytest.mark.parametrize(("stage", "others"), [("prior", DECODER), ("decoder", PRIOR)])
def test_a_stage_never_reads_the_others_components(
    folder: Path, model_config: Configure, stage: str, others: tuple[str, ...]
) -> None:
    for name in others:
        shutil.rmtree(folder / name)
    load(stage, model_config(folder))


@pytest.mark.parametrize("name", PRIOR + DECODER)
def test_a_missing_component_is_named(folder: Path, model_config: Configure, name: str) -> None:
    shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError, match=f"component '{name}' is missing"):
        load("prior" if name in PRIOR else "decoder", model_config(folder))


def test_a_component_that_is_not_listed_is_named(folder: Path, model_config: Configure) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists no component 'vae'"):
        load("decoder", model_config(folder))


def test_a_component_of_another_class_is_named(folder: Path, model_config: Configure) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "FluxTransformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'transformer' is a FluxTransformer2DModel, not a GlmImage"):
        load("decoder", model_config(folder))


@pytest.mark.parametrize(
    ("stage", "name", "file"),
    [
        ("prior", "vision_language_encoder", "model.safetensors"),
        ("decoder", "transformer", "diffusion_pytorch_model.safetensors"),
        ("decoder", "text_encoder", "model.safetensors"),
    ],
)
class TestWeights:
    def test_of_another_shape(
        self, folder: Path, model_config: Configure, stage: str, name: str, file: str
    ) -> None:
        weights = load_file(folder / name / file)
        key = max(weights, key=lambda key: weights[key].numel())
        save_file(weights | {key: weights[key][:-1].clone()}, folder / name / file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"component '{name}' cannot be loaded"):
            load(stage, model_config(folder))

    def test_that_lack_a_tensor(
        self, folder: Path, model_config: Configure, stage: str, name: str, file: str
    ) -> None:
        weights = load_file(folder / name / file)
        key = max(weights, key=lambda key: weights[key].numel())
        del weights[key]
        save_file(weights, folder / name / file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"component '{name}' lacks weights: .*{key}"):
            load(stage, model_config(folder))

    def test_that_are_damaged(
        self, folder: Path, model_config: Configure, stage: str, name: str, file: str
    ) -> None:
        (folder / name / file).write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=f"component '{name}' cannot be loaded"):
            load(stage, model_config(folder))

    def test_that_are_pickled_are_not_read(
        self, folder: Path, model_config: Configure, stage: str, name: str, file: str
    ) -> None:
        weights = load_file(folder / name / file)
        pickled = {"model.safetensors": "pytorch_model.bin"}.get(file, "diffusion_pytorch_model.bin")
        torch.save(weights, folder / name / pickled)
        (folder / name / file).unlink()
        with pytest.raises(CheckpointError, match=f"component '{name}' cannot be loaded"):
            load(stage, model_config(folder))


def test_precision_is_what_the_configuration_says(folder: Path, model_config: Configure) -> None:
    config = model_config(folder)
    half = config.prior.model_copy(update={"dtype": "bfloat16"})
    prior, _ = checkpoint.load_prior(config.model_copy(update={"prior": half}))
    assert {weight.dtype for weight in prior.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_demo_is_its_folder(model_config: Configure, stage: str) -> None:
    by_name, by_path = (weights(load(stage, model_config(one))) for one in ("demo", checkpoint.DEMO))
    assert by_name.keys() == by_path.keys()
    assert all(torch.equal(by_name[name], by_path[name]) for name in by_name)


def weights(loaded: Any) -> dict[str, torch.Tensor]:
    """Returns the weights of a stage's largest model."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded.transformer
    return dict(model.state_dict())


def test_the_demo_fits_the_repository() -> None:
    files = [file for file in checkpoint.DEMO.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files if file.suffix == ".safetensors"} == {
        "vision_language_encoder",
        "text_encoder",
        "transformer",
        "vae",
    }
    assert sum(file.stat().st_size for file in files) < 12 * 2**20


@pytest.mark.parametrize(
    "load",
    [
        lambda model: z_image.load_prior(model),
        lambda model: z_image.load_decoder(model),
        lambda _: ImageClassifier.load(ClassifierConfig(checkpoint="demo")),
        lambda _: ChatModel.load(ChatModelConfig(checkpoint="demo", device="cpu")),
    ],
)
def test_only_glm_image_has_the_demo(model_config: Configure, load: Callable[[ModelConfig], object]) -> None:
    with pytest.raises(CheckpointError, match=r"'demo' is not a folder .*, nor built in \(tiny\)"):
        load(model_config("demo"))


def test_a_missing_folder_is_named(model_config: Configure, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing-here' is not a folder .* give `revision`"):
        load("decoder", model_config(tmp_path / "nothing-here"))


MEASURE = """
import re, sys
from pathlib import Path
from deployments.config import DecoderConfig, ModelConfig, PriorConfig
from deployments.families.glm_image import checkpoint, tiny
stage = {"device": "cpu", "dtype": "float32"}
model = ModelConfig(name="m", family="glm_image", checkpoint=sys.argv[1], prior=PriorConfig(**stage),
                    decoder=DecoderConfig(**stage))
def copied():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = copied()
prior, _ = checkpoint.load_prior(model)
pipeline = checkpoint.load_decoder(model)
weights = sum(part.nbytes for model in (prior, pipeline.transformer) for part in model.parameters())
print((copied() - before) / weights)
"""


@pytest.mark.slow
def test_weights_are_not_copied_into_memory_before_they_go_to_their_device() -> None:
    """The files have the type that the configuration wants."""
    folder = tiny.cached(tiny.BENCHMARK)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


def test_transformers_moves_one_tensor_at_a_time(
    model_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps: list[object] = []
    from_pretrained = GlmImageForConditionalGeneration.from_pretrained

    def read(*args: Any, **kwargs: Any) -> Any:
        maps.append(kwargs["device_map"])
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(GlmImageForConditionalGeneration, "from_pretrained", read)
    checkpoint.load_prior(model_config())
    assert maps == [{"": "cpu"}]
