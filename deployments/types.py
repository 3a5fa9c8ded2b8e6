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


@dataclass(frozen=True, kw_only=True)
class PriorRequest:
    """Asks the prior stage for the tokens of one unit.

    Attributes:
        prompt: plain text. Whatever it contains, none of it is read as a control token.
        width: of the image to be made, in pixels; legal for the family (see `deployments.families`).
        height: likewise.
        seed: 0 to 2**63 - 1. Equal requests with equal seeds get equal tokens.
        sources: source images, already of legal size; empty for text-to-image.
        asked_at: when the unit was asked for, on the clock of `time.time`; see `deployments.loading`.
    """

    prompt: str
    width: int
    height: int
    seed: int
    sources: tuple[Pixels, ...] = ()
    asked_at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class PriorTokens:
    """What the prior stage answers.

    Attributes:
        target: tokens of the image to be made.
        sources: tokens of each source image, in the order of the request.
        read: how many tokens prompt and source images made.
        drawn: how many tokens were drawn: those of the image and of the smaller one that comes before it.
    """

    target: TokenGrid
    sources: tuple[TokenGrid, ...] = ()
    read: int = 0
    drawn: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come with a unit.

    Attributes:
        done: tokens drawn, or denoising steps made.
        total: of how many.
        seconds: since the stage began with the unit.
    """

    done: int
    total: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Asks the decoder stage for the pixels of one unit.

    Attributes:
        prompt: as in the prior's request; the decoder reads only the text in quotes.
        width: in pixels.
        height: in pixels.
        seed: of the initial noise, 0 to 2**63 - 1.
        steps: denoising steps, at least 1.
        guidance_scale: 0 or more; at 1 and below, guidance is off.
        previews: how many are wanted, 0 to 3; fewer come when there are few steps.
        tokens: what the prior stage answered.
        sources: the same source images that the prior stage was given.
        asked_at: as in the prior's request.
    """

    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    tokens: PriorTokens
    previews: int = 0
    sources: tuple[Pixels, ...] = ()
    asked_at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a unit is going to look like, as far as can be told after one of its steps.

    Attributes:
        index: which of the unit's previews, from 0.
        pixels: smaller than the image: the longer side 512 or less.
    """

    index: int
    pixels: Pixels


Event = Progress | Preview
"""What a stage tells of a unit before its result."""
