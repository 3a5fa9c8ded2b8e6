"""What crosses a Serve handle: plain, picklable values. No torch, no Ray, no HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An RGB image: shape (height, width, 3), values 0-255."""

TokenGrid = NDArray[np.int64]
"""Prior tokens of one image: shape (height / 32, width / 32), values below the codebook's size."""


Embedding = NDArray[np.float32]
"""What a text encoder makes of a text; also of numbers that were shorter."""


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """What is asked of any stage.

    Attributes:
        asked_at: when the unit was asked for, on the clock of `time.time`; see `deployments.stages.loading`.
        request_id: of the request that it belongs to, for the log.
        traceparent: of the span that asks; see `deployments.observability.tracing`.
    """

    asked_at: float = field(default_factory=time.time)
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class PriorRequest(StageRequest):
    """Asks the prior stage about one unit.

    Attributes:
        prompt: plain text. Whatever it contains, none of it is read as a control token.
        width: of the image to be made, in pixels; legal for the family (see `deployments.families`).
        height: likewise.
        seed: 0 to 2**63 - 1. Equal requests with equal seeds get equal answers.
        negative_prompt: what not to paint; empty for families that have none.
        guidance_scale: as in the decoder's request.
        sources: source images, already of legal size; empty for text-to-image.
    """

    prompt: str
    width: int
    height: int
    seed: int
    negative_prompt: str = ""
    guidance_scale: float = 0
    sources: tuple[Pixels, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What the prior stage answers, for the decoder stage to follow; each family has a kind of its own.

    Attributes:
        text_tokens: how many tokens were read of the texts.
        source_tokens: how many of the source images.
        drawn_tokens: how many were drawn.
        weights: of the model that made it, see `deployments.config.ModelConfig`; the stage says so.
    """

    text_tokens: int = 0
    source_tokens: int = 0
    drawn_tokens: int = 0
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class PriorTokens(Prior):
    """What an autoregressive model answers. Of its drawn tokens some are of a smaller image that comes first.

    Attributes:
        target: tokens of the image to be made.
        sources: tokens of each source image, in the order of the request.
    """

    target: TokenGrid
    sources: tuple[TokenGrid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings(Prior):
    """What a text encoder answers.

    Attributes:
        prompt: a line for each token: shape (tokens, channels).
        negative_prompt: likewise; None where guidance is off.
    """

    prompt: Embedding
    negative_prompt: Embedding | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come with a unit.

    Attributes:
        done: tokens drawn or read, or denoising steps made.
        total: of how many.
        seconds: since the stage began with the unit.
    """

    done: int
    total: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DecodeRequest(StageRequest):
    """Asks the decoder stage for the pixels of one unit.

    Attributes:
        prompt: as in the prior's request.
        width: in pixels.
        height: in pixels.
        seed: of the initial noise, 0 to 2**63 - 1.
        steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance, 0 or more; from where on it is off the family says.
        cfg_normalization: whether guidance may not lengthen the velocity; for families that have it.
        strength: how much of the source image is painted over, more than 0 to 1; likewise.
        previews: how many are wanted, 0 to 3; fewer come when there are few steps.
        prior: what the prior stage answered.
        sources: the same source images that the prior stage was given.
    """

    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    prior: Prior
    cfg_normalization: bool = False
    strength: float = 1
    previews: int = 0
    sources: tuple[Pixels, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a unit is going to look like, as far as can be told after one of its steps.

    Attributes:
        index: which of the unit's previews, from 0.
        pixels: smaller than the image: the longer side 512 or less.
    """

    index: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class CheckRequest(StageRequest):
    """Asks the safety checker about an image.

    Attributes:
        pixels: the image.
    """

    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class ExpansionRequest(StageRequest):
    """Asks a chat model to rewrite a prompt.

    Attributes:
        instruction: what it is to do.
        prompt: plain text, as in `PriorRequest`.
        max_tokens: of the answer, at least 1.
    """

    instruction: str
    prompt: str
    max_tokens: int


Event = Progress | Preview
"""What a stage tells of a unit before its result."""
