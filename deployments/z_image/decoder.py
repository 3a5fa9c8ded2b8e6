"""The decoder of Z-Image: embeddings of texts to pixels, by upstream's own pipelines. No Ray in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ZImageImg2ImgPipeline
from PIL import Image, ImageOps

from deployments import acceleration
from deployments.diffusion import PipelineDecoder
from deployments.types import TextEmbeddings
from deployments.z_image import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, Embedding
    from deployments.z_image.pipeline import DecoderPipeline


class Decoder(PipelineDecoder):
    """Paints by `ZImagePipeline`, and over a source image by `ZImageImg2ImgPipeline` (diffusers 0.42).

    A source image of another shape than the image's is scaled to fill it, and cut at the edges.
    """

    def __init__(self, pipeline: DecoderPipeline) -> None:
        super().__init__(pipeline)
        self._editing = ZImageImg2ImgPipeline(**pipeline.components)
        self._editing.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None] = lambda _: None) -> Decoder:
        """See `deployments.families.Decoder`."""
        pipeline = checkpoint.load_decoder(model, report)
        acceleration.apply(pipeline, model.decoder, max_side=model.traits.max_side)
        decoder = cls(pipeline)
        text = np.zeros((1, pipeline.transformer.config.cap_feat_dim), dtype=np.float32)
        acceleration.try_out(model.decoder, decoder.decode, TextEmbeddings(prompt=text, negative_prompt=text))
        return decoder

    def _run(self, request: DecodeRequest, **arguments: Any) -> torch.Tensor:
        texts = request.prior
        assert isinstance(texts, TextEmbeddings)  # noqa: S101 - both stages are of one family
        arguments |= {
            "prompt_embeds": self._lines(texts.prompt),
            "negative_prompt_embeds": self._lines(texts.negative_prompt),
            "cfg_normalization": request.cfg_normalization,
            "width": request.width,
            "height": request.height,
        }
        if not request.sources:
            images: torch.Tensor = self._pipeline(**arguments).images
            return images
        size = (request.width, request.height)
        source = ImageOps.fit(Image.fromarray(request.sources[0]), size, Image.Resampling.LANCZOS)
        images = self._editing(image=source, strength=request.strength, **arguments).images
        self._pipeline.maybe_free_model_hooks()  # they are this one's
        return images

    def _lines(self, text: Embedding | None) -> list[torch.Tensor]:
        """As the pipelines take embeddings: a tensor for each image."""
        if text is None:
            return []
        return [torch.tensor(text, dtype=self._pipeline.transformer.dtype, device=self._device)]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        unscaled: torch.Tensor = latents / config.scaling_factor + config.shift_factor
        return unscaled
