"""How unsafe an image is, by a classifier of transformers. No Ray in here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from deployments.engines.checkpoint import load_flat
from deployments.engines.memory import surviving
from deployments.errors import CheckpointError, NotANumber
from deployments.helpers.image_classifier import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.config import ClassifierConfig
    from deployments.stages.calls import Call
    from deployments.types import Pixels


class ImageClassifier:
    """Scores one image at a time. Used by one thread at a time.

    Args:
        model: a Vision Transformer (https://arxiv.org/abs/2010.11929) with a head for classification.
        processor: makes images what the model was trained on.
        unsafe_labels: of the model's labels, which count.

    Attributes:
        fault: why it has stopped for good, or None while it works.
        done: how many images it has scored.

    Raises:
        CheckpointError: the model has no such label.
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
                f"the classifier has no label {', '.join(unknown)}; it has {', '.join(label_ids)}"
            )
        self._unsafe = [label_ids[label] for label in unsafe_labels]
        self.fault: Exception | None = None
        self.done = 0
        self.unit = "images"

    @classmethod
    def load(
        cls, config: ClassifierConfig, report: Callable[[float], None] = lambda _: None
    ) -> ImageClassifier:
        """Load the classifier.

        Args:
            config: which, and where it runs.
            report: told, now and then, the share of the weights that is loaded, 0 to 1.

        Raises:
            CheckpointError: the checkpoint is missing or does not fit.
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
        """How probable it is that an image is unsafe, 0 to 1. An image is not worth stopping for.

        Raises:
            OutOfMemoryError: the device has too little memory.
            NotANumber: what came out is no probability.
        """
        with surviving(self, self._model.device, "the classifier", call):
            score = self._score(pixels)
        self.done += 1
        return score

    @torch.inference_mode()
    def _score(self, pixels: Pixels) -> float:
        images = self._processor(images=pixels, return_tensors="pt")["pixel_values"]
        logits = self._model(images.to(self._model.device, self._model.dtype)).logits
        score = float(logits.float().softmax(-1)[0, self._unsafe].sum())
        if score != score:  # not a number is not equal to itself
            raise NotANumber("the classifier's score is not a number")
        return min(score, 1.0)
