"""Preparation of prompts before a model reads them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ZERO_WIDTH_SPACE = "\u200b"
QUOTATION_MARKS = (("'", "'"), ("“", "”"), ('"', '"'), ("「", "」"))
"""Quotation marks that GLM-Image knows: `GlmImagePipeline.get_glyph_texts` (diffusers 0.42)."""
QUOTED = [re.compile(f"{begin}([^{begin}{end}]*){end}") for begin, end in QUOTATION_MARKS]


def quoted_texts(prompt: str) -> list[str]:
    """Returns the quoted parts of a prompt, which appear in the image as text.

    They are ordered by the kind of quotation marks, then by their place in the prompt. A pair of apostrophes
    counts as quotation marks, because the model reads it so.
    """
    return [text for quoted in QUOTED for text in quoted.findall(prompt)]


def plain_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Returns the prompt with a break in every string that the tokenizer would read as a control token.

    Other prompts are returned unchanged. The break is a zero-width space, so the text reads the same. The
    search is repeated until nothing is found, because a break may form another control token.
    """
    reserved = tokenizer.added_tokens_decoder.keys()
    while True:
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        found = [
            start
            for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if token in reserved and end - start > 1  # a single letter cannot be broken
        ]
        if not found:
            return prompt
        for start in reversed(found):
            prompt = prompt[: start + 1] + ZERO_WIDTH_SPACE + prompt[start + 1 :]
