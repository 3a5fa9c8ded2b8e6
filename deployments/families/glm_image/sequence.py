"""What the language model reads and writes for one request, known in full before its first token is drawn."""

from __future__ import annotations

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
    """One request as the language model sees it; tensors on the CPU.

    Attributes:
        prompt: token ids, with placeholders where the tokens of source images belong: shape (prompt,).
        positions: rotary positions, of time, rows and columns, of the prompt and of every token to be
            drawn: shape (3, prompt + drawn).
        drawn: how many tokens are drawn: the preview grid of text-to-image, then the target grid.
        target: rows and columns of the target grid, the last of what is drawn.
        pixel_values: patches of all source images: shape (patches, channels × patch × patch), or None.
        sources: rows and columns of each source image's grid.
    """

    prompt: torch.Tensor
    positions: torch.Tensor
    drawn: int
    target: tuple[int, int]
    pixel_values: torch.Tensor | None
    sources: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens that the key/value cache must hold; the last one drawn is read by nobody."""
        return len(self.prompt) + self.drawn - 1


class Sequencer:
    """Makes sequences of requests: CPU work, to be done by one thread at a time.

    Args:
        model: asked for positions only; no weight is used.
        processor: the checkpoint's.
    """

    def __init__(self, model: GlmImageForConditionalGeneration, processor: GlmImageProcessor) -> None:
        self._model = model
        self._processor = processor

    def sequence(self, request: ImageRequest) -> Sequence:
        """Tokenize the request as upstream does, except that its prompt holds no control tokens."""
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
        # Upstream keeps the positions of what is to be drawn on the module, the end token's included.
        core = self._model.model
        positions, _ = core.get_rope_index(
            inputs["input_ids"], inputs["image_grid_thw"], inputs["images_per_sample"]
        )
        drawn = sum(rows * columns for rows, columns in targets)
        return Sequence(
            prompt=inputs["input_ids"][0],
            positions=torch.cat([positions[:, 0], core._cached_decode_position_ids[0, :, :drawn]], dim=-1),
            drawn=drawn,
            # Target grids come largest first, and are drawn smallest first.
            target=tuple(targets[0]),
            pixel_values=inputs.get("pixel_values"),
            sources=tuple(map(tuple, sources)),
        )
