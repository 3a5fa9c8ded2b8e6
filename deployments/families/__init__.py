"""The model families: the facts that the API plane needs about each, and the location of its engines.

A family is a package with three modules. `prior` defines `PriorEngine`, `decoder` defines `Decoder`, and
`footprint` has the sizes of the released checkpoint. Importing this module loads no torch: only the replica
that runs an engine does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Self

    from deployments.config import ModelConfig
    from deployments.memory_plan import Footprint
    from deployments.stages.calls import Call
    from deployments.types import ImageRequest, Pixels, Prior


Parameter = Literal["negative_prompt", "cfg_normalization", "strength"]
"""Name of a request parameter that only some families accept."""
PARAMETERS: tuple[Parameter, ...] = get_args(Parameter)
GUIDANCE_PARAMETERS: frozenset[Parameter] = frozenset({"negative_prompt", "cfg_normalization"})
"""Parameters that have no effect without guidance."""


class FamilyEngine(Protocol):
    """An engine of either stage.

    Attributes:
        fault: reason why the engine has stopped for good, or None while it works.
        work: amount of work done for all requests so far, by unit. The first unit is the one of progress.
    """

    fault: Exception | None
    work: dict[str, int]

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None]) -> Self:
        """Loads the components of its stage and no others.

        Args:
            model: configuration of the model.
            report: called repeatedly with the share of the loading that is done, 0 to 1. Compilation is
                part of the loading.

        Raises:
            CheckpointError: a component is missing or does not fit.
            UnsupportedOption: this machine, or a library, lacks something that an option needs.
            OutOfMemoryError: the device has too little memory.
        """


class PriorEngine(FamilyEngine, Protocol):
    """Computes priors from prompts and source images, for several requests at once.

    It counts the `tokens` that it draws, and the `passes` that it needs for them, once for each request in a
    pass. An engine that draws none counts the tokens that it reads.
    """

    def submit(self, request: ImageRequest, call: Call) -> Future[Prior]:
        """Enqueues one unit and returns the future of its prior. May be called from any thread.

        Progress is reported a few times a second at most. An engine that draws tokens fails the future with
        `Cancelled` within a pass after the call is cancelled. The future fails with `RequestTooLong` if the
        request exceeds `max_sequence_length`.
        """

    def run(self) -> None:
        """Processes submitted units. Returns only after a fault."""


class Decoder(FamilyEngine, Protocol):
    """Turns priors into pixels. Used by one thread at a time. It counts denoising `steps`."""

    def decode(self, request: ImageRequest, call: Call) -> Pixels:
        """Computes the pixels of one unit. Reports previews, and progress after every denoising step.

        Raises:
            Cancelled: the call was cancelled. Raised within a denoising step.
            OutOfMemoryError: this unit needs more memory than is free.
            NotANumber: the pixels are not finite.
        """


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        package: Python package of its engines.
        built_in: names of the checkpoints that come with the server.
        parameters: the family-specific parameters that it accepts.
        guidance_scale: default guidance scale, which the configuration may override.
        edit_guidance_scale: default guidance scale of edits. None stands for `guidance_scale`.
        guidance_off: largest guidance scale at which guidance is off.
        draws_tokens: whether its prior stage draws tokens, which takes many passes.
        max_sequence_length: default token limit of the prior stage, which the configuration may override.
        hosted_steps: default number of denoising steps in fal's and Pixazo's documents. None where they
            document no default; the model's own applies.
        side_multiple: divisor of both sides of every source image and every generated image, in pixels.
        min_side: smallest side of every image, in pixels.
        max_side: largest side of every image, in pixels.
        max_aspect: largest aspect ratio of a source image, longer side over shorter.
        max_sources: largest number of source images of one edit.
        examples: prompts that its released checkpoints make well, which the configuration may replace.
    """

    package: str
    built_in: tuple[str, ...]
    parameters: frozenset[Parameter]
    guidance_scale: float
    edit_guidance_scale: float | None
    guidance_off: float
    draws_tokens: bool
    max_sequence_length: int
    hosted_steps: int | None
    side_multiple: int
    min_side: int
    max_side: int
    max_aspect: int
    max_sources: int
    examples: tuple[str, ...]

    @property
    def legal_sides(self) -> str:
        """Description of the legal side lengths, for error messages."""
        return f"a multiple of {self.side_multiple} from {self.min_side} to {self.max_side}"

    def is_legal_size(self, width: int, height: int) -> bool:
        """Returns whether an image of this size, in pixels, can be generated."""
        return all(
            side % self.side_multiple == 0 and self.min_side <= side <= self.max_side
            for side in (width, height)
        )

    def prior_engine(self) -> type[PriorEngine]:
        """Imports the family's prior engine and returns its class."""
        module = importlib.import_module(f"{self.package}.prior")
        return cast("type[PriorEngine]", module.PriorEngine)

    def decoder(self) -> type[Decoder]:
        """Imports the family's decoder and returns its class."""
        module = importlib.import_module(f"{self.package}.decoder")
        return cast("type[Decoder]", module.Decoder)

    def footprint(self) -> Footprint:
        """Imports the sizes of the family's released checkpoint, which loads no torch, and returns them."""
        module = importlib.import_module(f"{self.package}.footprint")
        return cast("Footprint", module.FOOTPRINT)


FAMILIES = {
    # The sizes are from the model's documentation (512-2048, multiples of 32). The aspect limit of its image
    # processor is in transformers' image_processing_pil_glm_image.py, `smart_resize`.
    "glm_image": Family(
        package="deployments.families.glm_image",
        built_in=("tiny", "demo"),
        parameters=frozenset(),
        guidance_scale=1.5,
        edit_guidance_scale=None,
        guidance_off=1,
        draws_tokens=True,
        max_sequence_length=24_576,
        hosted_steps=30,
        side_multiple=32,
        min_side=512,
        max_side=2048,
        max_aspect=4,
        max_sources=4,
        examples=(
            'A bakery\'s shop front on a rainy evening, neon sign "FRESH BREAD"',
            'A poster for a jazz night: a trumpet in blue smoke, the title "MIDNIGHT BRASS"',
            'An open recipe book with the heading "Lemon Tart" and a sketch of the tart',
        ),
    ),
    # The values are from the released models' page and from `ZImagePipeline` (diffusers 0.42). The page
    # bounds the total area, 512² to 2048² pixels; here each side has these bounds.
    "z_image": Family(
        package="deployments.families.z_image",
        built_in=("tiny",),
        parameters=frozenset({"negative_prompt", "cfg_normalization", "strength"}),
        guidance_scale=4,
        edit_guidance_scale=1.5,
        guidance_off=0,
        draws_tokens=False,
        max_sequence_length=512,
        hosted_steps=None,
        side_multiple=32,
        min_side=512,
        max_side=2048,
        max_aspect=4,
        max_sources=1,
        examples=(
            "A fox asleep in autumn leaves, picture-book illustration in gouache",
            "Portrait of an old fisherman at dawn, harbour behind him, 85 mm photograph",
            "A glass greenhouse on a cliff in the fog, seen from above",
        ),
    ),
}
