"""Train the demo checkpoint, part by part.

    python -m training.demo FOLDER

Interrupted, it goes on where it was. `FOLDER/checkpoint` is the checkpoint then; beside it are a log of each
part and `samples.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.demo import codebook, decoder, prior, reading, samples, vae
from training.demo.trainer import Workshop

PARTS = {
    "codebook": codebook.train,
    "vae": vae.train,
    "prior": prior.train,
    "decoder": decoder.train,
    "reading": reading.train,
    "samples": samples.paint,
}


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m training.demo",
        description="Train the demo checkpoint, part by part.",
    )
    parser.add_argument("folder", type=Path, help="for the checkpoint, logs, and samples")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="all by default, in this order; each needs those before it",
    )
    parser.add_argument(
        "--minutes", type=float, default=6, help="of training for each part, interruptions not counted"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8, help="processes that make the batches")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.folder, torch.device(options.device), options.minutes, options.workers)
    for part in options.parts:
        PARTS[part](shop)


if __name__ == "__main__":
    main()
