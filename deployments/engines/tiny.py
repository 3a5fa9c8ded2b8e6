"""Small checkpoints with random weights, made of real classes. They are cached, or written by a command.

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
"""Index files of the two layouts: diffusers' and transformers'. A checkpoint has one of them."""
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
    """An object of a library that can be saved: a pipeline, a model, or a processor of its input."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Writes the object to a folder, its weights as safetensors."""


class TinyCheckpoint(Generic[Sizes]):
    """Maker of a family's checkpoints with random weights.

    Args:
        file: source file of the module that defines `make`.
        presets: sizes by name; each is a dataclass of integers. The first one is the default.
        make: makes the parts of a checkpoint of given sizes: a pipeline, or a model and its processor.
    """

    def __init__(
        self, file: str, presets: Mapping[str, Sizes], make: Callable[[Sizes], Sequence[Part]]
    ) -> None:
        self._file = Path(file)
        self._presets = presets
        self._usual = next(iter(presets.values()))
        self._make = make

    def cached(self, sizes: Sizes | None = None) -> Path:
        """Returns the folder of a checkpoint in the user's cache. Writes the checkpoint if it is missing.

        The folder's name has a digest of the sizes and of the code that makes the checkpoint, this module
        included. So changed code makes a new folder. Several processes may call this at the same time.

        Args:
            sizes: sizes of the checkpoint. Defaults to the first preset.
        """
        sizes = sizes or self._usual
        code = self._file.read_bytes() + Path(__file__).read_bytes()
        digest = hashlib.sha256(code + repr(sizes).encode()).hexdigest()[:16]
        folder: Path = cached_assets_path("glm-image-server", namespace="tiny") / digest
        if not folder.exists():
            self.write(folder, sizes)
        return folder

    def write(self, folder: Path, sizes: Sizes | None = None) -> None:
        """Writes a checkpoint to a folder, which appears complete in one step.

        If another process writes the folder first, its checkpoint is kept: the two are equal.

        Args:
            folder: folder to create.
            sizes: sizes of the checkpoint. Defaults to the first preset.

        Raises:
            FileExistsError: the folder exists and is not a checkpoint.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for part in self._make(sizes or self._usual):
                part.save_pretrained(scratch)
            scratch.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            try:
                scratch.rename(folder)
            except OSError as error:  # not empty: another process was first
                if not folder.exists():
                    raise
                if not any((folder / index).exists() for index in INDEXES):
                    raise FileExistsError(
                        f"{folder} exists and is not a checkpoint; choose another folder"
                    ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def main(self, prog: str, arguments: Sequence[str]) -> None:
        """Writes a checkpoint, with the folder and the sizes from the command line.

        Args:
            prog: the command, for its help.
            arguments: what follows the command.
        """
        usual_name = next(iter(self._presets))
        what = self._file.parent.name
        parser = argparse.ArgumentParser(
            prog=prog,
            description=f"Write a {what} checkpoint with random weights, for tests and benchmarks.",
        )
        parser.add_argument("folder", type=Path, help="folder to create; it must not exist")
        parser.add_argument(
            "--preset",
            choices=self._presets,
            default=usual_name,
            help="preset of the sizes; the other options override it",
        )
        for field in dataclasses.fields(self._usual):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=int,
                help="; ".join(f"{k}: {getattr(v, field.name)}" for k, v in self._presets.items()),
            )
        options = vars(parser.parse_args(arguments))
        folder, preset = options.pop("folder"), self._presets[options.pop("preset")]
        chosen = {name: value for name, value in options.items() if value is not None}
        if folder.exists():
            parser.error(f"{folder} exists already; choose another folder")
        try:
            sizes = dataclasses.replace(preset, **chosen)
        except ValueError as error:
            parser.error(str(error))
        self.write(folder.absolute(), sizes)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"wrote {folder} ({size / 1e6:.1f} MB)")


def chat_tokenizer() -> Qwen2Tokenizer:
    """Returns a small tokenizer of Qwen's class: single bytes (a BPE without merges), then control tokens."""
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
