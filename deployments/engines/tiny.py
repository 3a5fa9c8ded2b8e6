"""Small checkpoints with random weights, made of real classes: cached, or written by hand.

They have the folder layout of released checkpoints and are loaded by the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from huggingface_hub import cached_assets_path
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from _typeshed import DataclassInstance

Sizes = TypeVar("Sizes", bound="DataclassInstance")
INDEXES = ("model_index.json", "config.json")
"""What a checkpoint has one of, by its layout: diffusers' or transformers'."""
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class Part(Protocol):
    """What of the libraries can be written."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write it, weights as safetensors."""


class TinyCheckpoint(Generic[Sizes]):
    """How random checkpoints are made.

    Args:
        file: where the recipe is written.
        presets: sizes by name, of a dataclass; the first ones are the usual ones.
        make: makes what is written of these sizes: a pipeline, or a model and what prepares its input.
    """

    def __init__(
        self, file: str, presets: Mapping[str, Sizes], make: Callable[[Sizes], Sequence[Part]]
    ) -> None:
        self._file = Path(file)
        self._presets = presets
        self._usual = next(iter(presets.values()))
        self._make = make

    def cached(self, sizes: Sizes | None = None) -> Path:
        """The folder of the checkpoint of these sizes in the user's cache, written when it is not there yet.

        The folder's name holds a digest of the sizes and of the recipe, this module included, so that a
        changed recipe is not served from an old cache. Safe when several processes ask at once.
        """
        sizes = sizes or self._usual
        recipe = self._file.read_bytes() + Path(__file__).read_bytes()
        digest = hashlib.sha256(recipe + repr(sizes).encode()).hexdigest()[:16]
        folder: Path = cached_assets_path("glm-image-server", namespace="tiny") / digest
        if not folder.exists():
            self.write(folder, sizes)
        return folder

    def write(self, folder: Path, sizes: Sizes | None = None) -> None:
        """Write a checkpoint to `folder`, which appears at once and whole.

        When another process has written the folder meanwhile, its work is kept: the two are equal.

        Raises:
            FileExistsError: `folder` is there and holds something other than a checkpoint.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for part in self._make(sizes or self._usual):
                part.save_pretrained(scratch)
            scratch.chmod(0o755)  # mkdtemp's folders are for their owner alone
            try:
                scratch.rename(folder)
            except OSError as error:  # not empty: somebody was there first
                if not folder.exists():
                    raise
                if not any((folder / index).exists() for index in INDEXES):
                    raise FileExistsError(f"{folder} exists and is not a checkpoint") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def main(self) -> None:
        """Write a checkpoint where the command line says."""
        usual_name = next(iter(self._presets))
        what = self._file.parent.name
        parser = argparse.ArgumentParser(
            prog=f"python -m deployments.{what}.{self._file.stem}",
            description=f"Write a checkpoint ({what}) with random weights, to test or to benchmark with.",
        )
        parser.add_argument("folder", type=Path, help="where to write it; must not exist yet")
        parser.add_argument(
            "--preset", choices=self._presets, default=usual_name, help="the sizes to begin with"
        )
        for field in dataclasses.fields(self._usual):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=int,
                help="; ".join(f"{k}: {getattr(v, field.name)}" for k, v in self._presets.items()),
            )
        options = vars(parser.parse_args())
        folder, preset = options.pop("folder"), self._presets[options.pop("preset")]
        chosen = {name: value for name, value in options.items() if value is not None}
        if folder.exists():
            parser.error(f"{folder} exists already")
        try:
            sizes = dataclasses.replace(preset, **chosen)
        except ValueError as error:
            parser.error(str(error))
        self.write(folder.absolute(), sizes)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"wrote {folder} ({size / 1e6:.1f} MB)")


def chat_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with a small vocabulary: single bytes (a BPE without merges), then the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end, *others = CONTROL_TOKENS
    tokenizer = Qwen2Tokenizer(
        vocab={token: id_ for id_, token in enumerate([*alphabet, *CONTROL_TOKENS])},
        merges=[],
        unk_token=end,
        eos_token=CONTROL_TOKENS[2],
        pad_token=end,
        extra_special_tokens=others,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
