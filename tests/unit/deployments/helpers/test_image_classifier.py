"""The safety checker's classifier scores as transformers' own code does, and names its errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from deployments.config import DEFAULT_CLASSIFIER, DEFAULT_CLASSIFIER_REVISION, ClassifierConfig
from deployments.errors import CheckpointError, NotANumber, OutOfMemoryError
from deployments.helpers.image_classifier import tiny
from deployments.helpers.image_classifier.classifier import ImageClassifier
from deployments.stages.calls import Call
from deployments.types import Pixels
from tests.classifiers import flagging, writable_copy


def picture(seed: int, height: int = 96, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(folder: str | Path = "tiny", **options: tuple[str, ...]) -> ImageClassifier:
    return ImageClassifier.load(ClassifierConfig(checkpoint=str(folder), **options))


def test_a_score_equals_that_of_transformers() -> None:
    model = ViTForImageClassification.from_pretrained(tiny.cached())
    processor = ViTImageProcessorPil.from_pretrained(tiny.cached())
    with torch.inference_mode():
        logits = model(**processor(images=picture(1), return_tensors="pt")).logits
    assert load().score(picture(1), Call()) == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-6)


def test_unsafe_labels_add_up_and_unknown_ones_are_rejected() -> None:
    both = load(unsafe_labels=("nsfw", "normal"))
    assert both.score(picture(1), Call()) == pytest.approx(1)
    assert both.score(picture(1), Call()) <= 1
    with pytest.raises(CheckpointError, match="no label violent; it has normal, nsfw"):
        load(unsafe_labels=("nsfw", "violent"))


def test_a_rigged_classifier_flags_a_known_image_and_no_other(tmp_path: Path) -> None:
    known, *others = (picture(seed) for seed in range(6))
    classifier = load(flagging(tmp_path / "rigged", [known], others))
    assert classifier.score(known, Call()) > 0.9
    assert all(classifier.score(other, Call()) < 0.1 for other in others)
    assert classifier.work["images"] == 6


def test_weights_that_are_not_safetensors_are_rejected(tmp_path: Path) -> None:
    folder = writable_copy(tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="ViTForImageClassification cannot be loaded"):
        load(folder)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="'/nowhere' is not a folder"):
        load("/nowhere")


def test_a_nan_is_an_error(tmp_path: Path) -> None:
    folder = writable_copy(tmp_path / "copy")
    model = ViTForImageClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(folder)
    classifier = load(folder)
    with pytest.raises(NotANumber):
        classifier.score(picture(1), Call())
    assert classifier.fault is None
    assert classifier.work["images"] == 0


def test_after_too_little_memory_the_next_image_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load()
    score = classifier.score(picture(1), Call())

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(ViTForImageClassification, "forward", full)
        with pytest.raises(OutOfMemoryError):
            classifier.score(picture(1), Call())
    assert classifier.score(picture(1), Call()) == score


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (DEFAULT_CLASSIFIER, DEFAULT_CLASSIFIER_REVISION)),
        ({"revision": "a" * 40}, (DEFAULT_CLASSIFIER, "a" * 40)),
        ({"checkpoint": "someone/else"}, ("someone/else", None)),
        ({"checkpoint": "/folder"}, ("/folder", None)),
    ],
)
def test_only_the_default_checkpoint_has_a_default_revision(
    fields: dict[str, str], expected: tuple[str, str | None]
) -> None:
    config = ClassifierConfig.model_validate(fields)
    assert (config.checkpoint, config.revision) == expected


@pytest.mark.parametrize(
    "make", [lambda: tiny.Sizes(width=3), lambda: tiny.Sizes(layers=0), lambda: tiny.Sizes(seed=-1)]
)
def test_impossible_sizes_are_rejected(make: Callable[[], tiny.Sizes]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()
