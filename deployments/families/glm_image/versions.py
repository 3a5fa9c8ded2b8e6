"""Differences between the versions of transformers in GLM-Image's vision-language model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from transformers.models.glm_image.modeling_glm_image import GlmImageTextDecoderLayer

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration

_parameters = inspect.signature(GlmImageTextDecoderLayer.forward).parameters
CACHE = "cache" if "cache" in _parameters else "past_key_values"
"""Name of a layer's argument for its cache. In 5.17 it is the second one, which 5.24 deprecates."""


def image_tokens(
    model: GlmImageForConditionalGeneration, pixel_values: torch.Tensor, grids: torch.Tensor
) -> torch.Tensor:
    """Returns the tokens of pictures.

    Until transformers 5.17 the model takes the features of all pictures as rows. Since 5.18 it takes a map
    of each picture (https://github.com/huggingface/transformers/pull/46405).

    Args:
        model: the vision-language model.
        pixel_values: patches of all pictures, one after the other: shape (patches, channels).
        grids: frames, rows and columns of patches of each picture: shape (pictures, 3).

    Returns:
        Ids of shape (patches,).
    """
    features = model.get_image_features(pixel_values, grids).pooler_output
    tokens: torch.Tensor = model.get_image_tokens(
        torch.cat(features) if features[0].ndim == 2 else features, grids
    )
    return tokens.flatten()
