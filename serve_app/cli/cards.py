"""GPUs by name: the memory of common NVIDIA cards that this machine need not have."""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.cli.gpus import GPU

CARDS = {
    "3090": ("RTX 3090", 24_576),
    "4090": ("RTX 4090", 24_564),
    "5090": ("RTX 5090", 32_607),
    "a6000": ("RTX A6000", 49_140),
    "6000-ada": ("RTX 6000 Ada", 49_140),
    "pro-6000": ("RTX PRO 6000 Blackwell", 97_887),
    "l4": ("L4", 23_034),
    "l40s": ("L40S", 46_068),
    "a10": ("A10", 23_028),
    "a10g": ("A10G", 23_028),
    "a100-40": ("A100 40 GB", 40_960),
    "a100-80": ("A100 80 GB", 81_920),
    "h100": ("H100 80 GB", 81_559),
    "h200": ("H200", 143_771),
    "b200": ("B200", 183_359),
}
"""Name and MiB of each card, by the name for `--gpu`. The MiB are the total that `nvidia-smi` shows.

Cards before Ampere are left out: they have no arithmetic in bfloat16.
"""
DRIVER_BYTES = 700_000_000
"""Memory that the driver keeps for itself. CUDA reports that much less than `nvidia-smi`.

An H200 has 143,771 MiB, and PyTorch reports 150.1 GB: 0.65 GB less. It is 0.4 GB on an RTX 4090.
"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU of this machine, or one that was named.

    Attributes:
        name: name of the card.
        room: bytes for processes.
        in_use: bytes of it that processes use now.
    """

    name: str
    room: int
    in_use: int = 0


def named(text: str) -> Card:
    """Returns the card of a name for `--gpu`, or one of a number of GB.

    Raises:
        argparse.ArgumentTypeError: no card has this name.
    """
    words = re.findall(r"[a-z0-9.]+", re.sub("nvidia|geforce|rtx", " ", text.lower()))
    key = "-".join(words).removesuffix("gb").rstrip("-")
    if key in CARDS:
        name, mebibytes = CARDS[key]
        return Card(name=name, room=mebibytes * 2**20 - DRIVER_BYTES)
    if re.fullmatch(r"[1-9]\d{0,2}(\.\d+)?", key):
        return Card(name=f"{key} GB", room=round(float(key) * 1e9) - DRIVER_BYTES)
    near = difflib.get_close_matches(key, CARDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise argparse.ArgumentTypeError(
        f"unknown GPU {text!r}; {hint}Known: {', '.join(CARDS)}, or a number of GB such as 48"
    )


def of_this_machine(gpu: GPU) -> Card:
    """Returns the card of a GPU that `nvidia-smi` lists."""
    room = gpu.total - DRIVER_BYTES
    return Card(name=gpu.name, room=room, in_use=max(0, room - gpu.free) if gpu.free else 0)
