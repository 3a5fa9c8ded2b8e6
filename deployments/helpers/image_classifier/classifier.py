"""A classifier of transformers that scores how unsafe an image is. It does not use Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from deployments.engines.checkpoint import load_flat
from deployments.engines.guard import guarded
from deployments.errors import CheckpointError, NotANumber
from deployments.helpers.image_classifier import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.config import ClassifierConfig
    from deployments.errors import EngineFault
    from deployments.stages.calls import Call
    from deployments.types import Pixels


class ImageClassifier:
    """Scores one image at a time. One thread at a time may use it.

    Args:
        model: Vision Transformer (https://arxiv.org/abs/2010.11929) with a head for classification.
        processor: converts images to the model's input.
        unsafe_labels: labels of the model that count as unsafe.

    Attributes:
        fault: fault that has stopped the classifier for good, or None while it works.
        work: number of `images` scored so far.

    Raises:
        CheckpointError: the model lacks one of the labels.
    """

    def __init__(
        self,
        model: ViTForImageClassification,
        processor: ViTImageProcessorPil,
        unsafe_labels: Sequence[str],
    ) -> None:
        self._model = model
        self._processor = processor
        label_ids = model.config.label2id
        if unknown := [label for label in unsafe_labels if label not in label_ids]:
            raise CheckpointError(
                f"the classifier has no label {', '.join(unknown)}; it has {', '.join(label_ids)}; correct "
                "unsafe_labels"
            )
        self._unsafe = [label_ids[label] for label in unsafe_labels]
        self.fault: EngineFault | None = None
        self.work = {"images": 0}

    @classmethod
    def load(
        cls, config: ClassifierConfig, report: Callable[[float], None] = lambda _: None
    ) -> ImageClassifier:
        """Loads the classifier.

        Args:
            config: configuration of the classifier.
            report: takes the share of the weights that is loaded, 0 to 1.

        Raises:
            CheckpointError: the checkpoint is missing or unusable.
        """
        model, processor = load_flat(
            config,
            ViTForImageClassification,
            ViTImageProcessorPil,
            report,
            built_in={"tiny": tiny.cached},
            device=config.device,
            dtype=config.dtype,
        )
        return cls(model, processor, config.unsafe_labels)

    def score(self, pixels: Pixels, call: Call) -> float:
        """Returns the probability that an image is unsafe, 0 to 1. Ignores cancelling: it takes little time.

        Raises:
            OutOfMemoryError: the device has too little memory.
            NotANumber: the score is NaN.
            EngineFault: the classifier has stopped for good.
        """
        with guarded(self, self._model.device, "the classifier", request_id=call.request_id):
            score = self._score(pixels)
        self.work["images"] += 1
        return score

    @torch.inference_mode()
    def _score(self, pixels: Pixels) -> float:
        images = self._processor(images=pixels, return_tensors="pt")["pixel_values"]
        logits = self._model(images.to(self._model.device, self._model.dtype)).logits
        score = float(logits.float().softmax(-1)[0, self._unsafe].sum())
        if score != score:  # only NaN differs from itself
            raise NotANumber("the classifier's score is not a number")
        return min(score, 1.0)
