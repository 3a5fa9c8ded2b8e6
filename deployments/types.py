"""Values that cross a Serve handle. They are picklable and know no torch, no Ray and no HTTP."""

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
    """Base of the requests to all stages.

    Attributes:
        submitted_at: time of submission, by `time.time`; see `deployments.stages.loading`.
        request_id: id of the client's request, for the log.
        traceparent: trace context of the caller; see `deployments.observability.tracing`.
    """

    submitted_at: float = field(default_factory=time.time)
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What the prior stage answers, for the decoder stage to follow; each family has a kind of its own.

    Attributes:
        text_tokens: how many tokens were read of the texts.
        source_tokens: how many of the source images.
        generated_tokens: how many were drawn.
        weights: of the model that made it, see `deployments.config.ModelConfig`; the stage says so.
    """

    text_tokens: int = 0
    source_tokens: int = 0
    generated_tokens: int = 0
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
class ImageRequest(StageRequest):
    """One image to make. The prior stage gets it first; the decoder stage gets it with its `prior`.

    Equal requests give equal results.

    Attributes:
        prompt: plain text; no part of it is read as a control token.
        width: width of the image in pixels, legal for the family (see `deployments.families`).
        height: height of the image in pixels, legal for the family.
        seed: 0 to 2**63 - 1.
        steps: denoising steps, 1 or more.
        guidance_scale: classifier-free guidance, 0 or more. `Family.guidance_off` says where it is off.
        negative_prompt: what not to paint; empty for families without it.
        cfg_normalization: whether guidance may not lengthen the velocity; for families that have it.
        strength: share of the source image that is painted over, above 0 to 1; for families that have it.
        previews: number of previews wanted, 0 to 3. Few steps give fewer.
        sources: source images of legal sizes; empty for text-to-image.
        prior: result of the prior stage; None before it.
    """

    prompt: str
    width: int
    height: int
    seed: int
    steps: int = 1
    guidance_scale: float = 0
    negative_prompt: str = ""
    cfg_normalization: bool = False
    strength: float = 1
    previews: int = 0
    sources: tuple[Pixels, ...] = ()
    prior: Prior | None = None


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
        prompt: plain text, as in `ImageRequest`.
        max_tokens: of the answer, at least 1.
    """

    instruction: str
    prompt: str
    max_tokens: int


Event = Progress | Preview
"""What a stage tells of a unit before its result."""
