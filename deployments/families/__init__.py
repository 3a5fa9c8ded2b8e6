"""The model families: what the API plane must know of each, and where its engines are.

A family is a package with a `prior` module that defines `PriorEngine` and a `decoder` module that
defines `Decoder`. Importing this module loads no torch: only the replica that runs an engine does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from deployments.config import ModelConfig
    from deployments.stages.calls import Call
    from deployments.types import ImageRequest, Pixels, Prior


Parameter = Literal["negative_prompt", "cfg_normalization", "strength"]
"""What only some families take."""
PARAMETERS: tuple[Parameter, ...] = get_args(Parameter)
GUIDANCE_PARAMETERS: frozenset[Parameter] = frozenset({"negative_prompt", "cfg_normalization"})
"""What has no effect without guidance."""


class PriorEngine(Protocol):
    """Turns prompts and source images into what the decoder follows, for several requests at once.

    Attributes:
        fault: why the engine has stopped for good, or None while it works.
        done: how many tokens it has drawn or, where none are drawn, read, for whomever.
        unit: what is counted.
    """

    fault: Exception | None
    done: int
    unit: str

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None]) -> PriorEngine:
        """Load the components of the prior stage and no others.

        Args:
            model: which.
            report: called now and then with the share of the loading that is done, 0 to 1. Compiling is part
                of it.

        Raises:
            CheckpointError: one of them is missing or does not fit.
        """

    def submit(self, request: ImageRequest, call: Call) -> Future[Prior]:
        """Ask for the prior of one unit; may be called from any thread.

        Progress is reported a few times a second at most. The future fails with `Cancelled` within a token
        after the call is cancelled, if tokens are drawn, and with `RequestTooLong` when the request has more
        tokens than a row.
        """

    def run(self) -> None:
        """Do what is submitted; returns only after a fault."""


class Decoder(Protocol):
    """Turns priors into pixels. Used by one thread at a time.

    Attributes:
        fault: why it has stopped for good, or None while it works.
        done: how many denoising steps it has made, for whomever.
        unit: what is counted.
    """

    fault: Exception | None
    done: int
    unit: str

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None]) -> Decoder:
        """Load the components of the decoder stage and no others.

        Args:
            model: which.
            report: called now and then with the share of the loading that is done, 0 to 1. Compiling is part
                of it.

        Raises:
            CheckpointError: one of them is missing or does not fit.
        """

    def decode(self, request: ImageRequest, call: Call) -> Pixels:
        """Make the pixels of one unit. Progress is reported after every denoising step, and previews.

        Raises:
            Cancelled: the call was cancelled; within a denoising step.
            OutOfMemoryError: this unit takes more memory than there is.
            NotANumber: what came out is no image.
        """


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        package: where its engines are.
        parameters: which of those that only some families take.
        guidance_scale: what a request gets that leaves it out, unless the configuration says another.
        edit_guidance_scale: likewise with source images; None is the same as without.
        guidance_off: the largest guidance scale at which guidance is off.
        max_sequence_length: of the prior stage, unless the configuration says another.
        hosted_steps: denoising steps that fal's and Pixazo's documents take for unset; None where they have
            none: the model's own.
        side_multiple: both sides of every image, made or given, are multiples of it.
        min_side: of every image, in pixels.
        max_side: of every image, in pixels.
        max_aspect: of a source image, longer side over shorter.
        max_sources: source images of one edit.
    """

    package: str
    parameters: frozenset[Parameter]
    guidance_scale: float
    edit_guidance_scale: float | None
    guidance_off: float
    max_sequence_length: int
    hosted_steps: int | None
    side_multiple: int
    min_side: int
    max_side: int
    max_aspect: int
    max_sources: int

    @property
    def legal_sides(self) -> str:
        """In words, for messages."""
        return f"a multiple of {self.side_multiple} from {self.min_side} to {self.max_side}"

    def is_legal_size(self, width: int, height: int) -> bool:
        """Whether an image of this size, in pixels, can be made."""
        return all(
            side % self.side_multiple == 0 and self.min_side <= side <= self.max_side
            for side in (width, height)
        )

    def prior_engine(self) -> type[PriorEngine]:
        """Import the family's prior engine."""
        module = importlib.import_module(f"{self.package}.prior")
        return cast("type[PriorEngine]", module.PriorEngine)

    def decoder(self) -> type[Decoder]:
        """Import the family's decoder."""
        module = importlib.import_module(f"{self.package}.decoder")
        return cast("type[Decoder]", module.Decoder)


FAMILIES = {
    # Sizes: the model's documentation (512-2048, multiples of 32); its image processor's aspect limit
    # is in transformers' image_processing_pil_glm_image.py, `smart_resize`.
    "glm_image": Family(
        package="deployments.families.glm_image",
        parameters=frozenset(),
        guidance_scale=1.5,
        edit_guidance_scale=None,
        guidance_off=1,
        max_sequence_length=24_576,
        hosted_steps=30,
        side_multiple=32,
        min_side=512,
        max_side=2048,
        max_aspect=4,
        max_sources=4,
    ),
    # The released models' page (total area of 512² to 2048² pixels) and `ZImagePipeline` (diffusers 0.42).
    "z_image": Family(
        package="deployments.families.z_image",
        parameters=frozenset({"negative_prompt", "cfg_normalization", "strength"}),
        guidance_scale=4,
        edit_guidance_scale=1.5,
        guidance_off=0,
        max_sequence_length=512,
        hosted_steps=None,
        side_multiple=32,
        min_side=512,
        max_side=2048,
        max_aspect=4,
        max_sources=1,
    ),
}
