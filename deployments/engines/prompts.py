"""What people write, before a model reads it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ZERO_WIDTH_SPACE = "\u200b"
QUOTATION_MARKS = (("'", "'"), ("“", "”"), ('"', '"'), ("「", "」"))
"""What GLM-Image takes for quotation marks: `GlmImagePipeline.get_glyph_texts` (diffusers 0.42)."""
QUOTED = [re.compile(f"{begin}([^{begin}{end}]*){end}") for begin, end in QUOTATION_MARKS]


def quoted_texts(prompt: str) -> list[str]:
    """What of a prompt is to be painted as text: by the kind of quotation marks, then in its order.

    Two apostrophes are quotation marks, too, as they are to the model.
    """
    return [text for quoted in QUOTED for text in quoted.findall(prompt)]


def plain_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt with every string that the tokenizer would read as a control token broken up.

    Other prompts come back as they are. The break is a zero-width space, so that the text reads
    the same; it is looked for again until there is none, since a break may bring forth another.
    """
    reserved = tokenizer.added_tokens_decoder.keys()
    while True:
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        found = [
            start
            for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if token in reserved and end - start > 1  # one letter cannot be broken
        ]
        if not found:
            return prompt
        for start in reversed(found):
            prompt = prompt[: start + 1] + ZERO_WIDTH_SPACE + prompt[start + 1 :]
