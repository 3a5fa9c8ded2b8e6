"""Events of a running request: progress, previews and images.

The stages yield `Progress` and `Preview` (`deployments.types`), which do not say of which image they are.
Here they become `StageProgress` and `PartialImage`, which do. Dialects word these for their clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from deployments.types import Pixels, Progress

Stage = Literal["prior", "decoder"]


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """Progress of one image.

    Attributes:
        image: index of the image, from 0.
        stage: the stage that works on it.
        progress: progress of that stage.
    """

    image: int
    stage: Stage
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class PartialImage:
    """A preview of one image.

    Attributes:
        image: index of the image, from 0.
        index: index of the preview, from 0.
        pixels: smaller than the image.
    """

    image: int
    index: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Everything about an image but its pixels.

    Attributes:
        seed: seed of this image. It gives the same image in a request of its own.
        prompt: the prompt that was painted.
        not_expanded: reason why the prompt was not expanded; empty otherwise.
        expansion_s: seconds that the prompt expansion took.
        risk: score of the safety checker relative to its threshold; 1 or more is flagged, None is unchecked.
        safety_s: seconds that the safety check took.
        text_tokens: tokens that the prior stage read of the texts.
        source_tokens: tokens that the prior stage read of the source images.
        generated_tokens: tokens that the prior stage generated.
        waiting_s: all other seconds: waiting for a stage, loading, and work that was lost with a replica.
        prior_s: seconds of work of the prior stage.
        decoder_s: seconds of work of the decoder stage.
    """

    seed: int
    prompt: str
    not_expanded: str = ""
    expansion_s: float = 0
    risk: float | None = None
    safety_s: float = 0
    text_tokens: int = 0
    source_tokens: int = 0
    generated_tokens: int = 0
    waiting_s: float = 0
    prior_s: float = 0
    decoder_s: float = 0

    @property
    def is_flagged(self) -> bool:
        """Whether the safety checker flagged the image."""
        return is_flagged(self.risk)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A finished image.

    Attributes:
        image: index of the image, from 0.
        pixels: black if the image was flagged.
        facts: everything else about it.
    """

    image: int
    pixels: Pixels
    facts: ImageFacts


Event = StageProgress | PartialImage | GeneratedImage


def is_flagged(risk: float | None) -> bool:
    """Returns whether an image of this risk is not to be shown; see `ImageFacts`."""
    return risk is not None and risk >= 1


def in_order(images: list[GeneratedImage]) -> list[GeneratedImage]:
    """Returns a request's images in their order."""
    return sorted(images, key=lambda image: image.image)
