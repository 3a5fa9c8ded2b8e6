"""diffusers' own pipeline on every version of transformers: the server's pixels are compared with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

if TYPE_CHECKING:
    from diffusers import GlmImagePipeline


def mended(pipeline: GlmImagePipeline) -> GlmImagePipeline:
    """Returns a pipeline that can edit.

    diffusers 0.42 expects the features of pictures as rows, and fails with transformers 5.18 or later, whose
    model gives and takes maps.
    """
    if Version(transformers.__version__) < Version("5.18"):
        return pipeline
    model: Any = pipeline.vision_language_encoder
    get_features, get_tokens = model.get_image_features, model.get_image_tokens

    def features(*given: torch.Tensor, **named: Any) -> Any:
        found = get_features(*given, **named)
        if named:  # the model itself asks by names
            return found
        found.pooler_output = [one.flatten(1).transpose(0, 1) for one in found.pooler_output]
        return found

    def tokens(rows: torch.Tensor, grids: torch.Tensor) -> Any:
        sizes = grids[:, 1:].tolist()
        parts = rows.split([height * width for height, width in sizes])
        maps = [
            part.transpose(0, 1).reshape(-1, *size).contiguous()
            for part, size in zip(parts, sizes, strict=True)
        ]
        return get_tokens(maps, grids)

    model.get_image_features, model.get_image_tokens = features, tokens
    return pipeline
