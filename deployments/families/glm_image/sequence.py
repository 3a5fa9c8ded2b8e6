"""Token sequences of requests: everything that is known before the language model draws its first token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from deployments.engines.prompts import plain_text

if TYPE_CHECKING:
    from transformers import GlmImageForConditionalGeneration, GlmImageProcessor

    from deployments.types import ImageRequest


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Inputs of the language model for one request. All tensors are on the CPU.

    Attributes:
        prompt: token ids, with placeholders for the tokens of source images: shape (prompt,).
        positions: rotary positions in time, rows and columns, for the prompt and every token to be drawn:
            shape (3, prompt + drawn).
        grids: rows and columns of the grids to be drawn, in this order. Text-to-image draws the preview grid,
            then the target grid. An edit draws only the target grid.
        pixel_values: patches of all source images: shape (patches, channels × patch × patch), or None.
        sources: rows and columns of each source image's grid.
    """

    prompt: torch.Tensor
    positions: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    pixel_values: torch.Tensor | None
    sources: tuple[tuple[int, int], ...]

    @property
    def drawn(self) -> int:
        """Number of tokens to be drawn."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def target(self) -> tuple[int, int]:
        """Rows and columns of the target grid, which is drawn last."""
        return self.grids[-1]

    @property
    def before_target(self) -> int:
        """Number of tokens that are drawn before the target grid."""
        return self.drawn - math.prod(self.target)

    @property
    def length(self) -> int:
        """Number of tokens that the key/value cache must hold. The last drawn token is never read."""
        return len(self.prompt) + self.drawn - 1


class Sequencer:
    """Converts requests to sequences, on the CPU. Used by one thread at a time.

    Args:
        model: model that computes the positions. No weight is used.
        processor: processor of the checkpoint.
    """

    def __init__(self, model: GlmImageForConditionalGeneration, processor: GlmImageProcessor) -> None:
        self._model = model
        self._processor = processor

    def sequence(self, request: ImageRequest) -> Sequence:
        """Tokenizes the request like upstream, except that its prompt contains no control tokens."""
        content: list[dict[str, Any]] = [
            {"type": "image", "image": Image.fromarray(source)} for source in request.sources
        ]
        content.append({"type": "text", "text": plain_text(self._processor.tokenizer, request.prompt)})
        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"target_h": request.height, "target_w": request.width},
        )
        grids = inputs["image_grid_thw"][:, 1:].tolist()
        sources, targets = grids[: len(request.sources)], grids[len(request.sources) :]
        # Upstream stores the positions of the tokens to be drawn, and of the end token, on the module.
        core = self._model.model
        positions, _ = core.get_rope_index(
            inputs["input_ids"], inputs["image_grid_thw"], inputs["images_per_sample"]
        )
        drawn = sum(rows * columns for rows, columns in targets)
        return Sequence(
            prompt=inputs["input_ids"][0],
            positions=torch.cat([positions[:, 0], core._cached_decode_position_ids[0, :, :drawn]], dim=-1),
            # Target grids are listed largest first and drawn smallest first.
            grids=tuple(map(tuple, reversed(targets))),
            pixel_values=inputs.get("pixel_values"),
            sources=tuple(map(tuple, sources)),
        )
