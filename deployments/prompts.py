"""What people write, before a model reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ZERO_WIDTH_SPACE = "\u200b"


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
