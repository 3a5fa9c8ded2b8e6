"""Classifiers of the real class with chosen weights: they flag known images."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import ViTForImageClassification, ViTImageProcessorPil

from deployments.helpers.image_classifier import tiny
from deployments.types import Pixels

LOGIT = 4.0
"""Of a label that is meant; it makes a probability of 0.9997."""


def writable_copy(folder: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny.cached(), folder))


def flagging(folder: Path, unsafe: Iterable[Pixels], safe: Iterable[Pixels]) -> Path:
    """Write a classifier that flags these images and not those; returns its folder.

    Its layers are the tiny checkpoint's; its head is solved for what they make of the images.
    """
    writable_copy(folder)
    model = ViTForImageClassification.from_pretrained(folder)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    images = [*((image, LOGIT) for image in unsafe), *((image, -LOGIT) for image in safe)]
    with torch.inference_mode():
        inputs = processor(images=[image for image, _ in images], return_tensors="pt")
        features = model.vit(**inputs).last_hidden_state[:, 0].double()
    ones = torch.ones(len(images), 1, dtype=torch.double)
    wanted = torch.tensor([[-logit, logit] for _, logit in images], dtype=torch.double)
    solution = torch.linalg.lstsq(torch.cat([features, ones], 1), wanted, driver="gelsd").solution
    with torch.no_grad():
        model.classifier.weight.copy_(solution[:-1].T)
        model.classifier.bias.copy_(solution[-1])
    model.save_pretrained(folder)
    return folder
