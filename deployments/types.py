"""Values that cross a Serve handle. They can be pickled, and use neither torch nor Ray nor HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""RGB image: shape (height, width, 3), values 0 to 255."""

TokenGrid = NDArray[np.int64]
"""Prior tokens of one image: shape (height / 32, width / 32), values below the codebook's size."""


Embedding = NDArray[np.float32]
"""Output of a text encoder for one text. It is float32 even if the encoder computes in fewer bits."""


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
    """Result of the prior stage, and input of the decoder stage. Each family has its own kind.

    Attributes:
        text_tokens: number of tokens read from the texts.
        source_tokens: number of tokens read from the source images.
        generated_tokens: number of tokens generated.
        passes: number of passes in which they were generated, without the one that read the prompt and
            generated the first.
        weights: weights that made it; see `deployments.config.ModelConfig`. The stage sets this.
    """

    text_tokens: int = 0
    source_tokens: int = 0
    generated_tokens: int = 0
    passes: int = 0
    weights: str = ""


@dataclass(frozen=True, kw_only=True)
class PriorTokens(Prior):
    """Result of an autoregressive model.

    `generated_tokens` includes the tokens of a smaller image, which are generated first and not kept.

    Attributes:
        target: tokens of the image to make.
        sources: tokens of each source image, in the order of the request.
    """

    target: TokenGrid
    sources: tuple[TokenGrid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings(Prior):
    """Result of a text encoder.

    Attributes:
        prompt: one row for each token of the prompt: shape (tokens, channels).
        negative_prompt: one row for each token of the negative prompt; None if guidance is off.
    """

    prompt: Embedding
    negative_prompt: Embedding | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a stage with one unit.

    Attributes:
        done: tokens generated or read so far, or denoising steps made.
        total: number of tokens or steps of the whole unit.
        seconds: seconds since the stage began with the unit.
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
        negative_prompt: description of what to avoid; empty for families without it.
        cfg_normalization: whether guidance may not lengthen the velocity; for families that support it.
        strength: share of the source image to paint over, above 0 to 1; for families that support it.
        previews: number of previews wanted, 0 to 3. Few steps give fewer.
        sources: source images of legal sizes; empty for text-to-image. The ingress may have a reference to
            them here, which Ray resolves on the way to the stage.
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
    """Estimate of a unit's final image, made after one of its steps.

    Attributes:
        index: number of the preview within the unit, from 0.
        pixels: the preview, smaller than the image: its longer side has 512 pixels or fewer.
    """

    index: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class CheckRequest(StageRequest):
    """Request to the safety checker.

    Attributes:
        pixels: the image to check.
    """

    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class ExpansionRequest(StageRequest):
    """Request to a chat model to rewrite a prompt.

    Attributes:
        instruction: the system prompt, which says how to rewrite.
        prompt: plain text; no part of it is read as a control token.
        max_tokens: maximum number of tokens in the answer, at least 1.
    """

    instruction: str
    prompt: str
    max_tokens: int


Event = Progress | Preview
"""Report of a stage about a unit, before the unit's result."""
