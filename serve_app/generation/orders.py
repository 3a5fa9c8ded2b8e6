"""What all APIs make of a request, each from its own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.generation.generator import Prepare
    from serve_app.generation.images import Encoding
    from serve_app.generation.request import Generation


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request that was read.

    Attributes:
        generation: what is to be made; its source images are missing still.
        encoding: how images become files.
        sources: how many source images there are.
        prepare: adds them; None if there are none.
    """

    generation: Generation
    encoding: Encoding
    sources: int = 0
    prepare: Prepare | None = None
