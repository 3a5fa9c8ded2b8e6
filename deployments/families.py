"""The model families: what the API plane must know of each, and where its engines are.

A family is a package with a `prior` module that defines `PriorEngine` and a `decoder` module that
defines `Decoder`. Importing this module loads no torch: only the replica that runs an engine does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from deployments.calls import Call
    from deployments.config import ModelConfig
    from deployments.types import DecodeRequest, Pixels, Prior, PriorRequest


class PriorEngine(Protocol):
    """Turns prompts and source images into prior tokens, for several requests at once.

    Attributes:
        fault: why the engine has stopped for good, or None while it works.
        done: how many tokens it has drawn, for whomever.
    """

    fault: Exception | None
    done: int

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None]) -> PriorEngine:
        """Load the components of the prior stage and no others.

        Args:
            model: which.
            report: told, now and then, the share of the weights that is loaded, 0 to 1.

        Raises:
            CheckpointError: one of them is missing or does not fit.
        """

    def submit(self, request: PriorRequest, call: Call) -> Future[Prior]:
        """Ask for the prior tokens of one unit; may be called from any thread.

        Progress is reported a few times a second at most. The future fails with `Cancelled` within a token
        after the call is cancelled, and with `RequestTooLong` when the request has more tokens than a row.
        """

    def run(self) -> None:
        """Do what is submitted; returns only after a fault."""


class Decoder(Protocol):
    """Turns prior tokens into pixels. Used by one thread at a time.

    Attributes:
        fault: why it has stopped for good, or None while it works.
        done: how many denoising steps it has made, for whomever.
    """

    fault: Exception | None
    done: int

    @classmethod
    def load(cls, model: ModelConfig, report: Callable[[float], None]) -> Decoder:
        """Load the components of the decoder stage and no others.

        Args:
            model: which.
            report: told, now and then, the share of the weights that is loaded, 0 to 1.

        Raises:
            CheckpointError: one of them is missing or does not fit.
        """

    def decode(self, request: DecodeRequest, call: Call) -> Pixels:
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
        side_multiple: both sides of every image, made or given, are multiples of it.
        min_side: of every image, in pixels.
        max_side: of every image, in pixels.
        max_aspect: of a source image, longer side over shorter.
        max_sources: source images of one edit.
    """

    package: str
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
        package="deployments.glm_image",
        side_multiple=32,
        min_side=512,
        max_side=2048,
        max_aspect=4,
        max_sources=4,
    ),
}
