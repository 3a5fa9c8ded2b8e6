"""The request of a client: as a route has parsed it, and with all parameters resolved."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deployments.types import ImageRequest

if TYPE_CHECKING:
    from deployments.config import ModelConfig
    from deployments.types import Pixels

Moderation = Literal["auto", "low"]
"""Strictness of the safety checker."""
ImageFormat = Literal["png", "jpeg", "webp"]
Source = bytes | str
"""A source image as the client sent it: a file, or a URL of one."""

MAX_SEED = 2**63 - 1
DRAWN_SEEDS = 2**52
"""Number of seeds that are drawn from, beginning with 0. The seeds of further images stay below 2**53, so
JavaScript has them exactly."""
MAX_PARTIAL_IMAGES = 3
MAX_ID_CHARS = 512
"""Longest request id and user id."""


@dataclass(frozen=True)
class Encoding:
    """File format of an image.

    Attributes:
        format: format of the file.
        quality: quality of JPEG and WebP, 0 to 100. PNG is always lossless.
    """

    format: ImageFormat = "png"
    quality: int = 100


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request in this server's own words. A parameter that is None gets the model's default.

    Attributes:
        prompt: what to paint.
        model: name of a model, or of its family; None for the default model. See `Generator.model`.
        size: width and height in pixels, legal for the family.
        crop: width and height of the middle of each image to keep; None keeps all of it.
        n: number of images. Image i has the seed `seed` + i.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        negative_prompt: what not to paint; for families that take it.
        cfg_normalization: whether guidance may not lengthen the velocity; for families that take it.
        strength: share of the source image that is painted over, 0.01 to 1; for families that take it.
        seed: seed of the first image, 0 to 2**63 - 1; None draws one.
        partial_images: previews of each image, 0 to 3.
        sources: images to edit.
        encoding: file format of the images.
        expand_prompt: whether to rewrite the prompt first.
        moderation: strictness of the safety checker, if there is one.
        blacken: whether a flagged image becomes a black one; otherwise the request fails.
        start_within_s: seconds after which the request fails if no stage has begun; None for no limit.
        api: name of the API of the request, for metrics: its dialect's, or its job's.
        request_id: id by which the client knows the request.
        key_id: id of the API key; empty without one.
    """

    prompt: str
    model: str | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    n: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    cfg_normalization: bool | None = None
    strength: float | None = None
    seed: int | None = None
    partial_images: int = 0
    sources: tuple[Source, ...] = field(default=(), repr=False)
    encoding: Encoding = Encoding()
    expand_prompt: bool = False
    moderation: Moderation = "auto"
    blacken: bool = False
    start_within_s: float | None = None
    api: str = ""
    request_id: str = ""
    key_id: str = ""

    @property
    def size_is_known(self) -> bool:
        """Whether the size is known before source images are decoded. Otherwise the first one gives it."""
        return self.size is not None or not self.sources


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(GenerationRequest):
    """A request whose parameters are all set. It makes the same images whenever it runs.

    Attributes:
        pixels: the decoded source images.
    """

    model: str
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    negative_prompt: str
    cfg_normalization: bool
    strength: float
    seed: int
    pixels: tuple[Pixels, ...] = field(default=(), repr=False)

    @property
    def work(self) -> float:
        """Megapixels of an image × denoising steps × images."""
        width, height = self.size
        return width * height * self.steps * self.n / 1e6

    def image_request(self, image: int, sources: Any) -> ImageRequest:
        """Returns the stages' request for one image.

        Args:
            image: index of the image, from 0.
            sources: `pixels`, or a reference to them.
        """
        width, height = self.size
        return ImageRequest(
            prompt=self.prompt,
            width=width,
            height=height,
            seed=self.seed + image,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            cfg_normalization=self.cfg_normalization,
            strength=self.strength,
            previews=self.partial_images,
            sources=sources,
            submitted_at=time.time(),
            request_id=self.request_id,
        )


def resolve(
    request: GenerationRequest, model: ModelConfig, pixels: tuple[Pixels, ...] = ()
) -> ResolvedRequest:
    """Draws the seed if there is none, and sets the other parameters that are None to the model's defaults.

    A job is resolved when it is submitted. So it has the same seed if it begins a second time.

    Args:
        request: the request.
        model: its model.
        pixels: its source images, decoded. The first one gives the size, if the request has none.
    """
    defaults, given = model.defaults, vars(request)
    size = (defaults.width, defaults.height)
    if pixels:
        size = (pixels[0].shape[1], pixels[0].shape[0])
    fallbacks = {
        "size": size,
        "steps": defaults.steps,
        "guidance_scale": model.guidance_scale(editing=bool(pixels)),
        "negative_prompt": "",
        "cfg_normalization": False,
        "strength": defaults.strength,
        "seed": secrets.randbelow(DRAWN_SEEDS),
    }
    filled_in = {name: value for name, value in fallbacks.items() if given[name] is None}
    return ResolvedRequest(**given | filled_in | {"model": model.name, "sources": (), "pixels": pixels})
