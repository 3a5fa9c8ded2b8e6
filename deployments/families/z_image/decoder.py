"""The decoder of Z-Image: text embeddings to pixels, by upstream's own pipelines. It does not use Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ZImageImg2ImgPipeline
from PIL import Image, ImageOps

from deployments.engines import acceleration, compilation
from deployments.engines.checkpoint import WEIGHTS_SHARE, part_of
from deployments.engines.diffusion import PipelineDecoder
from deployments.families.warm_up import warm_up_unit
from deployments.families.z_image import checkpoint
from deployments.types import TextEmbeddings

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.engines.acceleration import Size
    from deployments.families.z_image.pipeline import DecoderPipeline
    from deployments.types import Embedding, ImageRequest

TEXT_MULTIPLE = 32
"""Number of tokens to whose multiples the DiT pads texts: `SEQ_MULTI_OF` (diffusers 0.42)."""


class Decoder(PipelineDecoder):
    """Decodes by `ZImagePipeline`, and edits by `ZImageImg2ImgPipeline` (diffusers 0.42).

    A source image of another size is scaled to fill the target size, and cropped at its edges.
    """

    def __init__(self, pipeline: DecoderPipeline) -> None:
        super().__init__(pipeline)
        self._editing = ZImageImg2ImgPipeline(**pipeline.components)
        self._editing.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """Implements `deployments.families.FamilyEngine.load`."""
        read = 1.0
        if model.decoder.compiles:
            compilation.prepare(model.compile_cache)
            read = WEIGHTS_SHARE
        pipeline = checkpoint.load_decoder(model, part_of(report, 0, read))
        acceleration.apply(pipeline, model.decoder, max_side=model.traits.max_side)
        decoder = cls(pipeline)
        channels = pipeline.transformer.config.cap_feat_dim
        units = units_of_each_kind(*acceleration.warm_up_sizes(model), channels)
        acceleration.warm_up(model.decoder, decoder.decode, units, part_of(report, read, 1))
        return decoder

    def _run(self, request: ImageRequest, **arguments: Any) -> torch.Tensor:
        texts = request.prior
        assert isinstance(texts, TextEmbeddings)  # noqa: S101 - both stages are of one family
        arguments |= {
            "prompt_embeds": self._embeds(texts.prompt),
            "negative_prompt_embeds": self._embeds(texts.negative_prompt),
            "cfg_normalization": request.cfg_normalization,
            "width": request.width,
            "height": request.height,
        }
        if not request.sources:
            images: torch.Tensor = self.pipeline(**arguments).images
            return images
        size = (request.width, request.height)
        source = ImageOps.fit(Image.fromarray(request.sources[0]), size, Image.Resampling.LANCZOS)
        images = self._editing(image=source, strength=request.strength, **arguments).images
        self.pipeline.maybe_free_model_hooks()  # the editing pipeline shares its hooks
        return images

    def _embeds(self, text: Embedding | None) -> list[torch.Tensor]:
        """Returns an embedding as the pipelines take it: a list with a tensor for each image."""
        if text is None:
            return []
        return [torch.tensor(text, dtype=self.pipeline.transformer.dtype, device=self._device)]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        unscaled: torch.Tensor = latents / config.scaling_factor + config.shift_factor
        return unscaled


def units_of_each_kind(first: Size, others: Size, channels: int) -> list[ImageRequest]:
    """Returns units for all graphs of the DiT: with guidance and without.

    Texts of different lengths need a graph of their own, because the shorter one is masked.

    Args:
        first: width and height of the first unit.
        others: width and height of the other units.
        channels: number of channels of a text embedding.
    """
    # No length equals one of the model's widths; see `acceleration.warm_up_sizes`.
    short, long = (np.zeros((tokens, channels), dtype=np.float32) for tokens in (8, 3 * TEXT_MULTIPLE))
    return [
        warm_up_unit(first, TextEmbeddings(prompt=short, negative_prompt=short)),
        warm_up_unit(others, TextEmbeddings(prompt=short), guidance_scale=0),
        warm_up_unit(others, TextEmbeddings(prompt=short, negative_prompt=long)),
    ]
