"""What a request is in this server's own words, what is told of it while it is run, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from deployments.types import Pixels, Progress

Stage = Literal["prior", "decoder"]
Moderation = Literal["auto", "low"]
"""How strictly a request has its images checked."""
MAX_SEED = 2**63 - 1
MAX_PARTIAL_IMAGES = 3
MAX_ID_CHARS = 512
"""Of what clients call their requests and their users."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request in this server's own words. Parameters left out are None and get the model's defaults.

    Attributes:
        model: its name or its family's, see `Generator.model`, or None for the default model.
        prompt: what to paint.
        size: width and height in pixels, legal for the family.
        crop: width and height of the middle of each image, which alone is kept; None keeps all of it.
        n: how many images; image i has the seed `seed` + i; after the largest comes 0.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        negative_prompt: what not to paint, where the family takes it.
        cfg_normalization: whether guidance may not lengthen the velocity, likewise.
        strength: how much of the source image is painted over, 0.01 to 1, likewise.
        seed: of the first image, 0 to 2**63 - 1; None draws one.
        partial_images: previews of each image, 0 to 3.
        sources: images to edit, already legal (see `serve_app.generation.images.decode_source`).
        expand_prompt: whether the prompt is rewritten first.
        moderation: how strictly images are checked, if they are.
        blacken: whether an image that is flagged becomes a black one; else the request fails.
        api: by which it came.
        request_id: by which the client, or whoever asks for the status, knows it.
        key_id: of the API key with which it was asked for; empty if there was none.
        traceparent: of a job, that of the span that submitted it; see `deployments.observability.tracing`.
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
    sources: tuple[Pixels, ...] = ()
    expand_prompt: bool = False
    moderation: Moderation = "auto"
    blacken: bool = False
    api: str = ""
    request_id: str = ""
    key_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class Resolved(Generation):
    """A generation whose parameters are all there: it makes the same images whenever it is run."""

    model: str
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    negative_prompt: str
    cfg_normalization: bool
    strength: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image of a generation.

    Attributes:
        pixels: the image; black if it was flagged.
        seed: makes it again, alone.
        prompt: what was painted.
        not_expanded: why that is the prompt that was sent, though it was to be expanded.
        expansion_s: seconds that the expansion took.
        risk: from 1 on it was flagged, see `SafetyCheck.risk`; None if it was not checked.
        safety_s: seconds that the check took.
        text_tokens: what the prior stage read of the prompt.
        source_tokens: what it read of the source images.
        generated_tokens: what it drew.
        waiting_s: seconds for which it waited for a stage, loading included.
        prior_s: seconds of the prior stage's work on it.
        decoder_s: seconds of the decoder stage's.
    """

    pixels: Pixels
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


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """How far one image of a generation has come.

    Attributes:
        image: which, from 0.
        stage: where it is.
        progress: of that stage.
    """

    image: int
    stage: Stage
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class PartialImage:
    """What one image of a generation is going to look like.

    Attributes:
        image: which, from 0.
        index: which of its previews, from 0.
        pixels: smaller than the image.
    """

    image: int
    index: int
    pixels: Pixels


@dataclass(eq=False, kw_only=True)
class RunningUnit:
    """One image that is being made.

    Attributes:
        model: by its name.
        request_id: of the generation.
        began: on the clock of `time.monotonic`.
        progress: None while it waits for a stage.
        working_since: when the stage began with it.
    """

    model: str
    request_id: str
    began: float
    progress: StageProgress | None = None
    working_since: float = 0


Report = Callable[[StageProgress | PartialImage | GeneratedImage], None]
